"""MultiLoRA (arXiv 2311.11501): n parallel LoRAs in every linear, each with a scale per output.

    y = W0 x + (α / r) Σ_e diag(σ_e) B_e A_e x

A and B both start Kaiming-uniform and σ at zero: that is where the update's zero start lies, and all that learns in the
first step. No input and no task enters, so that it is one LoRA of rank n r once trained. There is no official code;
this follows the one in MTL-LoRA's, which adapts q, k, v and o projections only (`targets`).
"""

import torch
from torch import Tensor, nn

from moe_peft.layers.adapted import AdaptedLinear
from moe_peft.layers.factors import DenseFactors
from moe_peft.methods.mixture import Mixture


class ScaledFactors(DenseFactors):
    """Stacked pairs A [E r, D], B [O, E r], and a scale of every output of each.

    Args:
        in_features: D.
        out_features: O.
        rank: r.
        experts: E.
        device: where to create them.
    """

    def __init__(
        self, in_features: int, out_features: int, rank: int, experts: int, device: torch.device | str | None = None
    ) -> None:
        super().__init__(in_features, out_features, experts * rank, experts * rank, device)
        self.scales = nn.Parameter(torch.zeros(experts, out_features, device=device, dtype=torch.float32))
        nn.init.uniform_(self.B, -(rank**-0.5), rank**-0.5)

    def forward(self) -> tuple[Tensor, Tensor]:
        """Returns A and the scaled B."""
        b = self.B.unflatten(-1, (len(self.scales), -1)) * self.scales.mT.unsqueeze(-1)
        return self.A, b.flatten(1)


class MultiLoRA(Mixture):
    """Parallel LoRAs, without a router.

    Args:
        mixture: the arguments of `Mixture`; `experts` is n.
    """

    as_lora = {"experts": 1}

    def adapt(self, base: nn.Linear, slot: str) -> AdaptedLinear:
        """Scaled factors, no router."""
        place = self.places[slot]
        experts, rank, alpha = place.of(self.experts), place.of(self.rank), place.of(self.alpha)
        factors = ScaledFactors(base.in_features, base.out_features, rank, experts, base.weight.device)
        return AdaptedLinear(base, factors, None, self.scale(experts, rank, alpha), self.dropout, self.context, slot)
