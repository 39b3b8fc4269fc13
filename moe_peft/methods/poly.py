"""Polytropon (arXiv 2202.13914) and Multi-Head adapter Routing (arXiv 2211.03831): a task mixes LoRAs' parameters.

    y = W0 x + (α / r) B_t A_t x,   A_t = Σ_s w_s(t) A_s,   B_t = Σ_s w_s(t) B_s,   w = z / Σ z,   z = σ(θ_t)

While training z is drawn, for every row by itself, from a relaxed Bernoulli distribution at temperature 1. In q splits
(MHR) every slice of input and output has its own w. As Hugging Face PEFT's `PolyModel`, which has no α (α = 1) and one
learning rate; here θ's own is 0.1, as in the official code.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn

from moe_peft.layers.allocation import at_least
from moe_peft.layers.task_factors import StackedFactors, TaskLinear
from moe_peft.layers.task_routers import SkillRouter
from moe_peft.methods.mixture import TaskMixture


class Poly(TaskMixture):
    """Skills that every task mixes for itself.

    Args:
        splits: q; 1 is Polytropon, more is MHR.
        mixture: the arguments of `Mixture`; `experts` are the skills.
    """

    default_rates: ClassVar[Mapping[str, float]] = {"routers": 0.1}
    as_lora = {"experts": 1}

    def __init__(self, splits: int = 1, **mixture: Any) -> None:
        super().__init__(**mixture)
        at_least("splits", splits, 1)
        self.splits = splits

    def adapt(self, base: nn.Linear, slot: str) -> TaskLinear:
        """Stacked skills and this linear's weights of them.

        Raises:
            ValueError: a linear that cannot be cut so.
        """
        d, o, device = base.in_features, base.out_features, base.weight.device
        if d % self.splits or o % self.splits:
            raise ValueError(
                f"splits: {self.splits} does not divide {slot}, {d} to {o}; give a divisor of both, or other targets"
            )
        place = self.places[slot]
        experts, rank, alpha = place.of(self.experts), place.of(self.rank), place.of(self.alpha)
        factors = StackedFactors(d, o, rank, experts, self.splits, device)
        router = SkillRouter(len(self.specs), experts, self.splits, device)
        return TaskLinear(base, factors, router, self.scale(experts, rank, alpha), self.dropout, self.context, slot)
