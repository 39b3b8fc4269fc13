"""Methods on models that were loaded elsewhere: what `moe_peft.load_adapter` does to a plain model."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from torch import nn

from moe_peft.backbones import Backbone, CausalLM, Classifier, Seq2SeqLM
from moe_peft.fingerprint import fingerprint
from moe_peft.interop.hub import local_folder
from moe_peft.interop.lora_import import CONFIG
from moe_peft.interop.lora_module import lora_module
from moe_peft.layers.injection import output_head, place
from moe_peft.methods.base import MultitaskModule
from moe_peft.quirks import entries, unhooked
from moe_peft.runs import fill, find_checkpoint, read_saved, untrained


def adapter_on(model: nn.Module, folder: str | Path) -> MultitaskModule:
    """Injects a trained adapter into a plain model.

    Args:
        model: a Hugging Face model without adapters.
        folder: see `load_adapter`.

    Raises:
        ValueError: see `load_adapter`; the model is as before then.
    """
    devices = {str(parameter.device) for parameter in model.parameters()}
    if len(devices) > 1 or "meta" in devices:
        raise ValueError(f"model: its weights lie on {', '.join(sorted(devices))}; load it whole on one device")
    path = Path(folder).expanduser()
    path = path if path.exists() else local_folder(folder)
    with _restored(model):
        if (path / CONFIG).is_file():
            return lora_module(path, backbone_of(model))
        path = find_checkpoint(path)
        content = read_saved(path)
        module = untrained(path, content)
        module.backbone.adopt(model)
        found, wanted = fingerprint(module.backbone.load()), content["moe_peft"]["fingerprint"]
        if found != wanted:
            raise ValueError(
                f"adapter '{folder}': it was trained on {module.backbone.name!r} (fingerprint {wanted}), the model "
                f"here has {found}; load that base, of the same revision"
            )
        return fill(module, content)


def as_it_is(model: nn.Module) -> Callable[[], None]:
    """Returns what gives a model's parameters and modules back whether they learn, and their mode."""
    learning = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    modes = [(part, part.training) for part in model.modules()]

    def restore() -> None:
        for parameter, learns in learning:
            parameter.requires_grad_(learns)
        for part, mode in modes:
            part.training = mode

    return restore


@contextlib.contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    """Takes off a model what is put there within, but for adapted linears, and these too where it goes wrong."""
    linears = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    pooler, head = getattr(model, "pooler", None), output_head(model)
    try:
        # A module checks by hooks what its model is called with; with many adapters, their caller does it for them.
        with unhooked([*entries(model), *([] if head is None else [head])]):
            yield
    except BaseException:
        place(model, {name: layer for name, layer in linears.items() if not name.startswith("pooler.")})
        raise
    finally:
        if pooler is not None:  # `Classifier.load` takes it off, since no task uses it
            model.pooler = pooler


def backbone_of(model: nn.Module) -> Backbone:
    """Returns the backbone that a loaded model is.

    Raises:
        ValueError: a model of no known kind.
    """
    name = str(getattr(model.config, "name_or_path", "") or type(model).__name__)
    for kind in (CausalLM, Seq2SeqLM, Classifier):
        backbone = kind(name)
        with contextlib.suppress(ValueError):
            backbone.adopt(model)
            return backbone
    raise ValueError(f"model: a {type(model).__name__} is no causal or seq2seq language model, and no bare encoder")
