"""Which linears of a model are adapted, and putting the adapted ones in their place."""

import re
from collections.abc import Callable, Iterable, Mapping

from torch import nn

from moe_peft.layers.adapted import AdaptedLinear


def output_head(model: nn.Module) -> nn.Module | None:
    """Returns the model's output head (`lm_head`), if it has one."""
    get = getattr(model, "get_output_embeddings", None)
    return None if get is None else get()


def find_linears(model: nn.Module, targets: str | list[str]) -> list[str]:
    """Names the linears to adapt, in the model's order.

    Args:
        model: any module.
        targets: "all-linear" (every `nn.Linear` but the output head), a regular expression that must match a whole
            name, or a list of name suffixes ("q_proj", "mlp.down_proj").

    Raises:
        ValueError: nothing matches, or a suffix in the list matches nothing; lists what there is.
    """
    head = output_head(model)
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head]
    if targets == "all-linear":
        found, idle = names, []
    elif isinstance(targets, str):
        try:
            pattern = re.compile(targets)
        except re.error as error:
            raise ValueError(f"targets: {targets!r} is no regular expression ({error})") from None
        found, idle = [name for name in names if pattern.fullmatch(name)], []
    else:
        ends = [(target, "." + target) for target in targets]
        found = [name for name in names if any(("." + name).endswith(end) for _, end in ends)]
        idle = [target for target, end in ends if not any(("." + name).endswith(end) for name in names)]
    if idle or not found:
        suffixes = sorted({name.rsplit(".", 1)[-1] for name in names})
        raise ValueError(
            f"targets: {idle or targets!r} matches no linear; this model has {', '.join(suffixes) or 'none'}"
        )
    return found


def inject(
    model: nn.Module, names: Iterable[str], make: Callable[[nn.Linear, str], AdaptedLinear]
) -> dict[str, AdaptedLinear]:
    """Replaces linears of `model` in place.

    Args:
        model: the frozen model.
        names: of the linears (see `find_linears`).
        make: builds the adapted linear from the base linear and its name.

    Returns:
        The adapted linears by name, in the order of the names.
    """
    adapted = {}
    for name in names:
        base = model.get_submodule(name)
        assert isinstance(base, nn.Linear)
        adapted[name] = make(base, name)
    place(model, adapted)
    return adapted


def place(model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """Puts modules in the places of those of the same names."""
    for name, layer in layers.items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, layer)
