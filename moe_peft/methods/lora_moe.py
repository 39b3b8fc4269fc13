"""LoRAMoE (arXiv 2312.09979): a dense mixture of LoRA experts, half of which are to keep the model's world knowledge.

    y = W0 x + (α / r) Σ_e g_e B_e A_e x,   g = softmax(W x)
    constraint = β var(I ∘ Q) / mean(I ∘ Q)²

Q [B, E]: a row's mean weight of every expert. I is 1 + δ where the expert's group is the row's and 1 − δ elsewhere; the
first half of the experts is the group of the tasks that ask for knowledge, the second that of all others. As printed
(δ = 0.1) the constraint is least where every row prefers the *other* group, which has the smaller I; a negative δ draws
rows to their own. The routing report shows which way it went.

Differences from the official code, whose script leaves the constraint off: Q is a mean over real tokens, not a sum that
counts padding, so that long rows do not stand out; routers are averaged, not added up; B is the whole micro-batch, over
all ranks. The script adapts gate, up and down projections only (`targets`).
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from moe_peft.batch import Batch
from moe_peft.layers.mixtures import TokenRouter
from moe_peft.methods.mixture import TokenMixture
from moe_peft.methods.mixture_losses import Trace, spread


class LoRAMoE(TokenMixture):
    """Dense LoRA experts, with the localized balancing constraint where it is asked for.

    Args:
        constraint: β, weight of the localized balancing constraint; above 0 it needs `knowledge_tasks`.
        delta: δ; see the module for what its sign does.
        knowledge_tasks: names of the tasks that ask for world knowledge; all others are the second group.
        mixture: the arguments of `TokenMixture`; with the constraint an even number of experts.
    """

    as_lora = {"experts": 1}

    def __init__(
        self, constraint: float = 0.0, delta: float = 0.1, knowledge_tasks: list[str] | None = None, **mixture: Any
    ) -> None:
        super().__init__(**mixture)
        known, wanted = [spec.name for spec in self.specs], knowledge_tasks or []
        if constraint < 0:
            raise ValueError(f"constraint: {constraint} is negative; give 0 or more, and turn the sign of delta")
        if not -1 < delta < 1:
            raise ValueError(f"delta: {delta} is not between -1 and 1")
        if bool(constraint) != bool(wanted):
            raise ValueError(
                f"constraint: {constraint} with knowledge_tasks {wanted}; give both, or neither for the plain mixture"
            )
        for task in wanted:
            if task not in known:
                raise ValueError(f"knowledge_tasks: there is no task {task!r}; use some of {', '.join(known)}")
        of_layers = self.experts if isinstance(self.experts, list) else [self.experts]
        if constraint and any(experts % 2 for experts in of_layers):
            raise ValueError(f"experts: {self.experts} must be even, for two groups of experts; or set constraint: 0")
        self.constraint, self.delta, self.knowledge_tasks = constraint, delta, wanted

    @property
    def traced(self) -> bool:
        """Whether routers leave their scores for a loss."""
        return super().traced or self.constraint > 0

    def router(self, base: nn.Linear, experts: int, rank: int) -> TokenRouter:
        """A dense softmax over experts."""
        device = base.weight.device
        return TokenRouter(base.in_features, experts, self.layout, rank, traced=self.traced, device=device)

    def routing_losses(self, found: Mapping[str, Trace], batch: Batch) -> dict[str, Tensor]:
        """Adds the constraint."""
        terms = super().routing_losses(found, batch)
        if self.constraint:
            terms["constraint"] = self.constraint * self.localized_balance(found, batch["task_id"])
        return terms

    def localized_balance(self, found: Mapping[str, Trace], task_id: Tensor) -> Tensor:
        """Returns var(I ∘ Q) / mean(I ∘ Q)², averaged over routers."""
        types = torch.tensor([spec.name in self.knowledge_tasks for spec in self.specs], device=task_id.device)
        own = types[task_id].unsqueeze(1)
        values = []
        for scores, _, real, _ in found.values():
            used = (scores.softmax(-1) * real.unsqueeze(-1)).sum(1) / real.sum(1, keepdim=True)
            first = torch.arange(used.shape[1], device=used.device) < used.shape[1] // 2
            values.append(torch.where(own == first, 1 + self.delta, 1 - self.delta) * used)
        return spread(values)

    def expert_names(self, layer: str, experts: int) -> list[str]:
        """Names experts by their group and number, where there are groups."""
        names = super().expert_names(layer, experts)
        if not self.constraint:
            return names
        return [f"knowledge {at}" if 2 * int(at) < experts else f"other {at}" for at in names]
