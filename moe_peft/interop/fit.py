"""Whether an adapter that came from elsewhere fits a built method; asking changes nothing."""

from collections.abc import Iterable

from torch import nn

from moe_peft.interop.lora_import import TENSORS, Lora
from moe_peft.layers.peft_names import targeted
from moe_peft.methods.base import MultitaskModule


def refuse_other_base(module: MultitaskModule, fingerprint: str | None, base: str | None, where: str) -> None:
    """Refuses an adapter of another frozen model, where it says which.

    Args:
        module: built.
        fingerprint: of the adapter's base; None where it does not know.
        base: what the adapter calls its base.
        where: what to call the adapter.

    Raises:
        ValueError: the fingerprints differ.
    """
    if fingerprint not in (None, module.fingerprint):
        raise ValueError(
            f"{where} is of another base: fingerprint {fingerprint}, here {module.fingerprint}; configure its "
            f"backbone, {base}"
        )


def refuse_other_linears(module: MultitaskModule, slots: Iterable[str], where: str) -> None:
    """Refuses an adapter of linears that are not adapted here.

    Raises:
        ValueError: names the first one.
    """
    foreign = [slot for slot in slots if slot not in module.adapted]
    if foreign:
        raise ValueError(
            f"{where} adapts {foreign[0]}, which {type(module).__name__} here does not; set targets so that it does, "
            "or, if its backbone has no linear of that name, train the adapter on that kind of backbone"
        )


def refuse_unfit(module: MultitaskModule, lora: Lora, where: str) -> None:
    """Refuses a LoRA of another base, of other linears or of other sizes, or one of whose tensors some are missing.

    Raises:
        ValueError: names what does not fit.
    """
    refuse_other_base(module, lora.fingerprint, lora.base, where)
    there, here = lora.config.get("revision"), module.backbone.revision or "main"
    unknown = module.backbone.adopted or lora.fingerprint is not None  # which revision it is, or that it is the same
    if lora.base == module.backbone.name and there not in (None, here) and not unknown:
        raise ValueError(f"{where} is of revision {there!r} of {lora.base!r}, here it is {here!r}; set it so")
    refuse_other_linears(module, lora.updates, where)
    for slot, update in lora.updates.items():
        layer = module.adapted[slot]
        there, here = (update.a.shape[1], len(update.b)), (layer.in_features, layer.out_features)
        if there != here:
            raise ValueError(
                f"{where}: {slot} is {there[0]}x{there[1]} there and {here[0]}x{here[1]} here; another base"
            )
    missing = [slot for slot in targeted(lora.config, _linears(module)) if slot not in lora.updates]
    if missing:
        raise ValueError(
            f"{where}: '{TENSORS}' lacks {len(missing)} linears that its target_modules name, first {missing[0]}; "
            "export or download it again"
        )


def _linears(module: MultitaskModule) -> list[str]:
    """Lists the linears of the plain model."""
    inner = (nn.Linear, *{type(layer) for layer in module.adapted.values()})
    named = (name for name, part in module.built().named_modules() if isinstance(part, inner))
    return [name for name in named if name.rpartition(".")[0] not in module.adapted]
