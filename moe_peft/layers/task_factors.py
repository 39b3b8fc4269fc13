"""A frozen linear with stacked LoRAs, out of which every row of a batch gets a pair of factors by its task.

    A_b = Σ_e w_e(t_b) A_e,   B_b = Σ_e w_e(t_b) B_e          or the pair of expert t_b alone

Parameters are mixed, not outputs: the cost per token is one LoRA's. In q splits, slice i of the input is read, and
slice i of the output written, with weights of its own (arXiv 2211.03831). Shapes: n rows or tasks, D in, O out,
E experts, r rank, q splits.
"""

import torch
from torch import Tensor, nn

from moe_peft.context import Routing
from moe_peft.kernels.operands import Prepared
from moe_peft.layers.adapted import AdaptedLinear
from moe_peft.layers.factors import Factors
from moe_peft.layers.task_routers import SkillRouter


class StackedFactors(Factors):
    """E pairs of matrices; every slice of an A starts Kaiming-uniform (a = √5), every B at zero.

    Args:
        in_features: D.
        out_features: O.
        rank: r of each.
        experts: E.
        splits: q, a divisor of D and of O.
        device: where to create them.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        experts: int,
        splits: int = 1,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.rank_in = self.rank_out = rank
        self.A = nn.Parameter(torch.empty(experts, rank, in_features, device=device, dtype=torch.float32))
        self.B = nn.Parameter(torch.zeros(experts, out_features, rank, device=device, dtype=torch.float32))
        bound = (in_features // splits) ** -0.5
        nn.init.uniform_(self.A, -bound, bound)

    def forward(self, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the pairs of the chosen experts [n]: A [n, r, D] and B [n, O, r]."""
        return self.A[chosen], self.B[chosen]

    def mixed(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the pairs A [n, r, D] and B [n, O, r] of weights [n, q, E]."""
        splits = weights.shape[1]
        with torch.autocast(weights.device.type, enabled=False):
            a = torch.einsum("nqe,erqd->nrqd", weights, self.A.unflatten(-1, (splits, -1)))
            b = torch.einsum("nqe,eqor->nqor", weights, self.B.unflatten(1, (splits, -1)))
        return a.flatten(2), b.flatten(1, 2)


class TaskLinear(AdaptedLinear):
    """A frozen `nn.Linear` with such factors: those of a row's own task, or what its router mixes for it."""

    factors: StackedFactors
    router: SkillRouter | None

    @property
    def depends_on_task(self) -> bool:
        """Every task has its own factors."""
        return True

    def factors_of(self, tasks: Tensor) -> tuple[Tensor, Tensor]:
        """Returns A [n, r, D] and B [n, O, r] of tasks [n]: without a draw."""
        return self.factors(tasks) if self.router is None else self.factors.mixed(self.router.weights(tasks, False))

    def fixed_factors(self, task: int) -> tuple[Tensor, Tensor]:
        """Returns A [r, D] and B [O, r] of a task."""
        a, b = self.factors_of(torch.tensor([task], device=self.weight.device))
        return a[0], b[0]

    def active_factors(self, rows: int) -> tuple[Tensor, Tensor]:
        """Returns each row's own A [rows, r, D] and B [rows, O, r].

        Raises:
            ValueError: the rows' tasks are not known.
        """
        tasks = self.context.get("task_id", rows)
        if tasks is None:
            raise ValueError(f"{self.slot} knows no tasks of these rows: go through the module's forward")
        if self.router is None:
            return self.factors(tasks)
        weights = self.router.weights(tasks, drawn=self.training)
        self.context.record(self.slot, Routing(weights.mean(1, keepdim=True)))
        return self.factors.mixed(weights)

    def ready(self, x: Tensor) -> Prepared | None:
        """Returns each row's factors; kept from one decoding step to the next only, where making them costs most."""
        return super().ready(x) if x.shape[-2] == 1 else self._prepared(x)
