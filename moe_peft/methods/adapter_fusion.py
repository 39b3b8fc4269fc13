"""AdapterFusion (arXiv 2005.00247): one adapter per task, then attention of every token over all of them.

    y = z + s V Σ_e g_e u_e(z),   g = softmax_e((Q z + q) · K u_e(z)),   u_e as in `adapters`

Stage one (the `FreezeThenRoute` callback) trains every adapter, with its task's head, on its own task's rows, without
fusion; stage two leaves them as they are and trains Q, K and V. Without the callback all learn at once, through the
fusion. V starts at the identity, to which 0.01 Σ ‖1 - V‖² holds it. Differences from the official code: no bias of K,
which adds the same to all scores and so has no gradient; V is exactly the identity at the start (there 1e-6 beside the
diagonal); an adapter starts at zero; one fusion for all tasks, heads of stage one.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from moe_peft.batch import Batch
from moe_peft.layers.bottlenecks import ALONE, IDENTITY, BottleneckLinear, Bottlenecks, Fusion
from moe_peft.methods.adapters import Adapters
from moe_peft.methods.expert_clipping import ExpertClipping
from moe_peft.methods.training import LossMean


class AdapterFusion(ExpertClipping, Adapters):
    """Adapters of all tasks, joined by attention.

    Args:
        regularisation: weight of Σ ‖1 - V‖², the sum over layers.
        adapters: the arguments of `Adapters` but `per_task`; `loss_mean` is "task" here, any other couples the adapters
            while they learn one by one.
    """

    default_loss_mean: ClassVar[LossMean] = "task"
    task_decides: ClassVar[bool] = False

    def __init__(self, regularisation: float = 0.01, **adapters: Any) -> None:
        super().__init__(per_task=True, **adapters)
        if regularisation < 0:
            raise ValueError(f"regularisation: {regularisation} is negative, which would drive V away; give 0 or more")
        self.regularisation = regularisation

    def adapt(self, base: nn.Linear, slot: str) -> BottleneckLinear:
        """One adapter per task, and their fusion."""
        outputs, device = base.out_features, base.weight.device
        factors, fusion = Bottlenecks(outputs, self.width, self.copies, device), Fusion(outputs, device)
        return BottleneckLinear(base, factors, self.scale, self.context, slot, fusion)

    @property
    def fuses(self) -> bool:
        """Whether adapters are joined now, rather than each row served by its own task's."""
        return "routers" not in self.closed_groups

    @property
    def routes(self) -> bool:
        """Whether the fusion decides anything about the rows."""
        return self.fuses

    def expert_names(self, layer: str, experts: int) -> list[str]:
        """Names adapters by their tasks."""
        return [spec.name for spec in self.specs]

    def routed_tasks(self, batch: Batch) -> Tensor | None:
        """Returns the rows' tasks [B], which only adapters by themselves must know."""
        return batch.get("task_id") if self.fuses else super().routed_tasks(batch)

    def routing_facts(self, batch: Batch) -> dict[str, Tensor]:
        """Adds whose adapter serves each row, where they are not joined."""
        facts = super().routing_facts(batch)
        return facts if self.fuses or "task_id" not in facts else facts | {ALONE: facts["task_id"]}

    def method_loss_terms(self, batch: Batch) -> dict[str, Tensor]:
        """What holds V to the identity, while it learns."""
        distances = self.context.terms(IDENTITY)
        if not (self.regularisation and distances):
            return {}
        return {"identity": self.regularisation * torch.stack(list(distances.values())).sum()}
