"""Bottleneck adapters behind every FFN (Houlsby, arXiv 1902.00751; at this one place: Pfeiffer, arXiv 2005.00247).

    y = z + s (U relu(D z + d) + b),   z the output of the FFN's last linear, in R^O; D [m, O], U [O, m]

It does not fit W0 + B C A: it is not linear, and reads the linear's output. So it is neither merged nor a LoRA. Unlike
the papers' (N(0, 0.02) for both), U starts at zero, so that nothing changes at the start; their m is a sixteenth of O.
"""

from typing import Any, ClassVar

from torch import nn

from moe_peft.layers.allocation import at_least
from moe_peft.layers.bottlenecks import BottleneckLinear, Bottlenecks
from moe_peft.layers.ffn_mixtures import ffns
from moe_peft.layers.injection import find_linears
from moe_peft.methods.transforms import OutputTransform


class Adapters(OutputTransform):
    """Adapters behind the FFNs, shared by all tasks or one per task.

    `targets` left as it is means the last linear of every FFN; anything else names linears that get one each.

    Args:
        width: m.
        scale: s.
        transform: the arguments of `OutputTransform`.
    """

    sized_by: ClassVar[str] = "width"

    def __init__(self, width: int = 64, scale: float = 1.0, **transform: Any) -> None:
        super().__init__(**transform)
        at_least("width", width, 1)
        self.width, self.scale = width, scale

    def slots(self, model: nn.Module) -> list[str]:
        """Names the last linear of every FFN, or what `targets` names.

        Raises:
            ValueError: none is known by its name.
        """
        found = find_linears(model, self.targets)
        if self.targets != "all-linear":
            return found
        exits = list(ffns(found))
        if not exits:
            leaves = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in found}))
            raise ValueError(f"targets: no FFN is known by its linears' names ({leaves}); name the last of every FFN")
        return exits

    def adapt(self, base: nn.Linear, slot: str) -> BottleneckLinear:
        """An adapter, or one per task."""
        factors = Bottlenecks(base.out_features, self.width, self.copies, base.weight.device)
        return BottleneckLinear(base, factors, self.scale, self.context, slot)
