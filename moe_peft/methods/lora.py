"""LoRA (arXiv 2106.09685), shared over all tasks: the baseline every mixture must beat, through the same path.

y = W0 x + (α / r) B A x
"""

from typing import Any

from torch import nn

from moe_peft.layers.adapted import AdaptedLinear
from moe_peft.layers.factors import DenseFactors
from moe_peft.methods.base import MultitaskModule


class LoRA(MultitaskModule):
    """One low-rank adapter for all tasks; numerically HF PEFT's LoRA.

    Args:
        rank: r.
        alpha: α; the update is scaled by α / r.
        dropout: on the adapter's input.
        common: the arguments of `MultitaskModule`.
    """

    def __init__(self, rank: int = 8, alpha: float = 16.0, dropout: float = 0.0, **common: Any) -> None:
        super().__init__(**common)
        if rank < 1:
            raise ValueError(f"rank: {rank} is below 1")
        self.rank, self.alpha, self.dropout = rank, alpha, dropout

    def adapt(self, base: nn.Linear, slot: str) -> AdaptedLinear:
        """Dense factors of one rank, no router."""
        factors = DenseFactors(base.in_features, base.out_features, self.rank, self.rank, base.weight.device)
        return AdaptedLinear(base, factors, None, self.alpha / self.rank, self.dropout, self.context, slot)
