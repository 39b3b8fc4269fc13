"""A frozen linear with a bank of experts, one of which serves each row of a batch (TT-LoRA MoE, arXiv 2504.21190).

    y_b = W0 x_b + s * w_b * B_e(b) A_e(b) x_b          e(b): the expert chosen for row b, w_b: 1 in value

Which expert serves a row is decided once per batch, for all layers, and published in the routing context as "task_id".
Where nothing learns, folded experts come from a table (see `expert_cache`), at the lines published as "line".
Shapes: B rows, R rank, D in, O out, N lines.
"""

import torch
from torch import Tensor, nn

from moe_peft.context import RoutingContext
from moe_peft.kernels.operands import Prepared
from moe_peft.kernels.reference import Gate
from moe_peft.layers.adapted import AdaptedLinear
from moe_peft.layers.factors import TensorTrainFactors


class ExpertLinear(AdaptedLinear):
    """A frozen `nn.Linear` with E stacked tensor-train experts.

    Args:
        base: the linear to adapt.
        factors: the experts.
        scale: s.
        dropout: on the experts' input.
        context: the model's routing context.
        slot: this linear's name in the model, unique.
    """

    factors: TensorTrainFactors

    def __init__(
        self,
        base: nn.Linear,
        factors: TensorTrainFactors,
        scale: float,
        dropout: float,
        context: RoutingContext,
        slot: str,
    ) -> None:
        super().__init__(base, factors, None, scale, dropout, context, slot)
        self.table: tuple[Tensor, Tensor] | None = None
        """Folded experts A [N, R, D] and Bᵀ [N, R, O] (whole rows, so that lines are gathered and multiplied fast) in
        the base's dtype: a cache, neither saved nor moved."""

    @property
    def depends_on_task(self) -> bool:
        """Every task has its own expert."""
        return True

    def fixed_factors(self, task: int) -> tuple[Tensor, Tensor]:
        """Returns A [R, D] and B [O, R] of a task's own expert."""
        a, b = self.fold(torch.tensor([task], device=self.weight.device))
        return a[0], b[0]

    def fold(self, experts: Tensor) -> tuple[Tensor, Tensor]:
        """Returns A [n, R, D] and B [n, O, R] of the experts [n]."""
        return self.factors(experts)

    def active_factors(self, rows: int) -> tuple[Tensor, Tensor]:
        """Returns each row's own A [rows, R, D] and B [rows, O, R].

        Raises:
            ValueError: no expert was chosen for this batch.
        """
        line = self.context.get("line", rows)
        if line is not None and self.table is not None:
            a, b = (part.index_select(0, line) for part in self.table)
            return a, b.mT
        chosen = self.context.get("task_id", rows)
        if chosen is None:
            raise ValueError(f"{self.slot} has no expert for these rows: go through the module's forward")
        a, b = self.fold(chosen.clamp(min=0))
        return a, b if self.training else b * (chosen >= 0).view(-1, 1, 1)  # the null expert is for evaluation only

    def ready(self, x: Tensor) -> Prepared | None:
        """Returns each row's factors; kept from one decoding step to the next only, where gathering would cost most."""
        return super().ready(x) if self.table is not None and x.shape[-2] == 1 else self._prepared(x)

    def gate(self, x: Tensor) -> Gate:
        """Returns w for the whole expert; it acts in rank space, where it needs no gradient of A."""
        weight = self.context.get("weight", len(x))
        return Gate() if weight is None else Gate("block", beta=weight.view(-1, *(1,) * (x.dim() - 1)))
