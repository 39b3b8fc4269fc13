"""MoLA (arXiv 2402.08562): LoRA experts in every linear, top-k by token, more of them in some layers than in others.

    y = W0 x + (α / r) Σ_e g_e B_e A_e x,   g = softmax over the k largest of W x

Allocations by the paper's names, as `experts`: inverted triangle [2, 4, 6, 8] (their best), triangle [8, 6, 4, 2],
hourglass [8, 2, 2, 8], diamond [2, 8, 8, 2], rectangle 5. With `rank` as a list too this is HiLo (arXiv 2502.03884),
whose constants are not public. Differences from the official code: the balance loss, which it leaves off, is taken for
each router by itself and without padding.
"""

from typing import Any

from torch import nn

from moe_peft.layers.allocation import at_least
from moe_peft.layers.mixtures import TokenRouter, top_k
from moe_peft.methods.mixture import TokenMixture


class MoLA(TokenMixture):
    """Sparse LoRA experts with a number of experts by layer.

    Args:
        top_k: k, experts of a token; at most those that a layer has.
        mixture: the arguments of `TokenMixture`.
    """

    as_lora = {"experts": 1}

    def __init__(self, top_k: int = 2, **mixture: Any) -> None:
        super().__init__(**mixture)
        at_least("top_k", top_k, 1)
        self.top_k = top_k

    def router(self, base: nn.Linear, experts: int, rank: int) -> TokenRouter:
        """A linear map of x, the k largest kept."""
        return TokenRouter(
            base.in_features,
            experts,
            self.layout,
            rank,
            top_k(self.top_k),
            traced=self.traced,
            device=base.weight.device,
        )
