"""MTL-LoRA (arXiv 2410.09437): one A for all, a transform of rank space per task, n heads B that a task weighs.

    y = W0 x + (α / r) Σ_e g_e(t) B_e Λ_t A x,   g(t) = softmax(θ_t / τ),   Λ_t = I at the start

The official code's class leaves τ at 0, which divides by zero, and sets 0.1 in its script: with θ uniform in ±1/√n the
weights are sharp at the first step already. Its script adapts q, k, v and o projections only (`targets`), with a
dropout of 0.05. With one expert θ has no effect.
"""

from typing import Any, Literal

from torch import nn

from moe_peft.layers.task_routers import TransformRouter
from moe_peft.methods.mixture import TaskMixture


class MTLLoRA(TaskMixture):
    """A shared A, transforms and mixtures of heads by task.

    Args:
        transform: Λ_t, a "full" [r, r] or "diagonal".
        temperature: τ, of the softmax over heads.
        mixture: the arguments of `Mixture`; `experts` is n.
    """

    layout = "tall"

    def __init__(
        self, transform: Literal["full", "diagonal"] = "full", temperature: float = 0.1, **mixture: Any
    ) -> None:
        super().__init__(**mixture)
        if transform not in ("full", "diagonal"):
            raise ValueError(f"transform: {transform!r} is unknown; use full or diagonal")
        if temperature <= 0:
            raise ValueError(f"temperature: {temperature} must be above 0; the paper's is 0.1, 1 is a plain softmax")
        self.transform, self.temperature = transform, temperature

    def router(self, base: nn.Linear, experts: int, rank: int) -> TransformRouter:
        """Logits and transforms of every task."""
        tasks, full = len(self.specs), self.transform == "full"
        return TransformRouter(tasks, experts, rank, full, self.temperature, base.weight.device)
