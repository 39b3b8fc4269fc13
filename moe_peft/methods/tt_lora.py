"""TT-LoRA (arXiv 2408.01008): a LoRA whose A and B are themselves tensor trains, shared over all tasks.

y = W0 x + α ΔW x,   ΔW = B A a tensor train of rank r

The layout is the official code's (see `layers.tensor_train`), the scale is α itself, not α / r. Differences from it:
the update starts at exactly zero by default, and both forms of the forward compute the same matrix.
"""

from typing import Any

from torch import nn

from moe_peft.layers.adapted import AdaptedLinear
from moe_peft.layers.factors import TensorTrainFactors, TrainInit
from moe_peft.layers.tensor_train import Layout, layout_of
from moe_peft.methods.base import MultitaskModule

Shapes = dict[str, list[list[int]]]
"""Modes by size of linear, "<in>x<out>": [input modes, output modes]."""


class TTLoRA(MultitaskModule):
    """One tensor-train adapter for all tasks.

    Args:
        rank: r, of all inner bonds.
        alpha: α, the scale of the update.
        dropout: on the adapter's input.
        shapes: modes by size of linear, e.g. {"2048x512": [[16, 16, 4, 2], [2, 16, 16]]} for 2048 inputs and 512
            outputs; sizes that are not listed are cut into balanced modes.
        init: "zero" (the update starts at zero) or "official" (all cores of unit norm).
        common: the arguments of `MultitaskModule`.
    """

    def __init__(
        self,
        rank: int = 5,
        alpha: float = 16.0,
        dropout: float = 0.0,
        shapes: Shapes | None = None,
        init: TrainInit = "zero",
        **common: Any,
    ) -> None:
        super().__init__(**common)
        check_shapes(shapes or {})
        self.rank, self.alpha, self.dropout, self.shapes = rank, alpha, dropout, shapes or {}
        self.init: TrainInit = init

    def adapt(self, base: nn.Linear, slot: str) -> AdaptedLinear:
        """One tensor train, no router."""
        factors = TensorTrainFactors(layout_for(base, self.shapes), self.rank, self.init, device=base.weight.device)
        return AdaptedLinear(base, factors, None, self.alpha, self.dropout, self.context, slot)


def layout_for(base: nn.Linear, shapes: Shapes) -> Layout:
    """Returns the layout of a linear: as listed for its size, else balanced."""
    return layout_of(base.in_features, base.out_features, shapes.get(f"{base.in_features}x{base.out_features}"))


def check_shapes(shapes: Shapes) -> None:
    """Refuses shapes that fit no linear of their size, before anything is loaded.

    Raises:
        ValueError: a key that is not "<in>x<out>", or modes whose products are other sizes.
    """
    for size, modes in shapes.items():
        sides = size.split("x")
        if len(sides) != 2 or not all(side.isdecimal() for side in sides):
            raise ValueError(f'shapes: {size!r} is no size of a linear; write "<in>x<out>", such as "2048x512"')
        layout_of(int(sides[0]), int(sides[1]), modes)
