"""MoDE (arXiv 2408.01505): a mixture of dyadic experts, one A for all of them and a routing for every rank.

    y = W0 x + (α / r) Σ_e B_e diag(g_e) A x,   (g_1j … g_Ej) = softmax(W_j x) for rank j

With one routing for p ranks there are r / p of them; p = r is HydraLoRA. The paper has no α (set it to r) and starts A
normal with deviation 0.01, about the size of LoRA's start here. No official code is public.
"""

from typing import Any, ClassVar

from torch import Tensor, nn

from moe_peft.layers.allocation import at_least
from moe_peft.layers.mixtures import Layout, Rule, TokenRouter
from moe_peft.methods.mixture import Mixture


def by_rank(experts: int, ranks: int) -> Rule:
    """A softmax over the experts for each of several routings, every one of which serves so many ranks."""

    def rule(scores: Tensor) -> Tensor:
        g = scores.unflatten(-1, (-1, experts)).softmax(-1).mT
        return g.repeat_interleave(ranks, -1).flatten(-2)

    return rule


class MoDE(Mixture):
    """A shared A, and heads B that every rank weighs for itself.

    Args:
        ranks_per_router: p, ranks that share a routing; it must divide every layer's r.
        mixture: the arguments of `Mixture`.
    """

    layout: ClassVar[Layout] = "tall_diagonal"
    as_lora = {"experts": 1}

    def __init__(self, ranks_per_router: int = 1, **mixture: Any) -> None:
        super().__init__(**mixture)
        at_least("ranks_per_router", ranks_per_router, 1)
        for rank in self.rank if isinstance(self.rank, list) else [self.rank]:
            if rank % ranks_per_router:
                raise ValueError(f"ranks_per_router: {ranks_per_router} does not divide rank {rank}; give a divisor")
        self.ranks_per_router = ranks_per_router

    def router(self, base: nn.Linear, experts: int, rank: int) -> TokenRouter:
        """One softmax over the experts for every group of ranks."""
        return TokenRouter(
            base.in_features,
            experts * rank // self.ranks_per_router,
            self.layout,
            rank,
            by_rank(experts, self.ranks_per_router),
            device=base.weight.device,
        )
