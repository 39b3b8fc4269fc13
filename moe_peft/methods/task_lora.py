"""One LoRA (arXiv 2106.09685) per task, in one model: what multitask methods must beat, at T times the parameters.

    y = W0 x + (α / r) B_t A_t x

Nothing is shared: the loss is the sum of the tasks' own means, gradients are clipped task by task, and a row is served
by its own task's pair. What is left of the others is the common schedule.
"""

from typing import Any, ClassVar

from torch import nn

from moe_peft.layers.task_factors import StackedFactors, TaskLinear
from moe_peft.methods.expert_clipping import ExpertClipping
from moe_peft.methods.mixture import TaskMixture
from moe_peft.methods.training import LossMean


class TaskLoRA(ExpertClipping, TaskMixture):
    """Independent LoRAs, picked by task.

    Args:
        mixture: the arguments of `Mixture` but `experts`; `loss_mean` is "task" here, any other couples the tasks.
    """

    default_loss_mean: ClassVar[LossMean] = "task"

    def __init__(self, **mixture: Any) -> None:
        super().__init__(experts=1, **mixture)

    def adapt(self, base: nn.Linear, slot: str) -> TaskLinear:
        """One pair per task, no router."""
        place, tasks = self.places[slot], len(self.specs)
        rank, alpha = place.of(self.rank), place.of(self.alpha)
        factors = StackedFactors(base.in_features, base.out_features, rank, tasks, device=base.weight.device)
        return TaskLinear(base, factors, None, self.scale(tasks, rank, alpha), self.dropout, self.context, slot)
