"""MoRE's rank selector: every task picks, in every adapted linear, how many ranks of one LoRA it uses.

    p_t = softmax(W e_t + b)          over the N nested experts, expert k = the first ρ_k ranks
    p̃_t = onehot(argmax p_t) + straight-through gradient
    core = p̃_t M,  M[k, j] = c_k · 1[j ≤ ρ_k] · s_j        diagonal, [R]

No token enters: the core depends on the task alone (arXiv 2505.22694, Eq. 3 and 4; the straight-through branch of the
official code, which is never reached there). Shapes: B batch, T tasks, N experts, R ranks, D in, d embedding width.
"""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from moe_peft.context import Routing, RoutingContext
from moe_peft.kernels.reference import Gate
from moe_peft.layers.routers import Router

if TYPE_CHECKING:
    from moe_peft.layers.adapted import AdaptedLinear

Selector = Literal["full", "winner", "fixed", "random"]


class TaskEmbedding(nn.Module):
    """One trainable vector per task; starts at N(0, 0.01²) as in the official code.

    Args:
        tasks: T.
        width: d.
        device: where to create it.
    """

    def __init__(self, tasks: int, width: int, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(tasks, width, device=device, dtype=torch.float32))
        nn.init.normal_(self.weight, std=0.01)

    def forward(self) -> Tensor:
        """Returns the table [T, d]."""
        return self.weight.clone()  # FSDP2 hangs a hook on every output, and those on a parameter itself would pile up


class Chosen(torch.autograd.Function):
    """One-hot at the largest p [T, N]; its gradient is that of p, or of the largest p alone ("winner")."""

    @staticmethod
    def forward(ctx: Any, p: Tensor, winner: bool) -> Tensor:
        """Returns [T, N]."""
        chosen = torch.zeros_like(p).scatter_(-1, p.argmax(-1, keepdim=True), 1.0)
        ctx.save_for_backward(chosen if winner else None)
        return chosen

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # pyright: ignore
        """Returns the gradient of p."""
        (chosen,) = ctx.saved_tensors
        return gradient if chosen is None else gradient * chosen, None


class RankSelector(Router):
    """Chooses one of N nested experts per task.

    Args:
        width: d, width of the task embeddings.
        experts: M [N, R] of `nested_experts`.
        tasks: T.
        selector: "full" gives every expert its exact gradient c_k⟨G, E_k⟩; "winner" only the chosen one (the official
            code's intended branch); "random" keeps what the untrained gate picks (what the official code really does);
            "fixed" keeps what `start` says. The last two have no gate.
        start: [T] expert of every task, for "fixed".
        table: an embedding that all linears share (its owner registers it); None makes an own one.
        costed: leave the mean expected rank as the loss term "rank_cost" while training.
        device: where to create the parameters.
    """

    experts: Tensor
    """[N, R] fp32, saved: what the scaling made of the task list of the first training."""
    start: Tensor
    """[T] int64, saved: every task's expert before training."""

    def __init__(
        self,
        width: int,
        experts: Tensor,
        tasks: int,
        selector: Selector = "full",
        start: Tensor | None = None,
        table: TaskEmbedding | None = None,
        costed: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.selector, self.costed = selector, costed
        self.embedding = TaskEmbedding(tasks, width, device) if table is None else None
        self._shared = [table]  # in a list: a module listed by every selector would be saved by every selector
        weight, bias = torch.empty(len(experts), width, device=device), torch.empty(len(experts), device=device)
        nn.init.kaiming_uniform_(weight, nonlinearity="relu")
        nn.init.uniform_(bias, -1 / math.sqrt(width), 1 / math.sqrt(width))
        trained = selector in ("full", "winner")
        self.weight = nn.Parameter(weight, requires_grad=trained) if trained else None
        self.bias = nn.Parameter(bias, requires_grad=trained) if trained else None
        self.register_buffer("experts", experts.to(weight.device))
        if start is None:
            start = (self.task_embeddings().detach() @ weight.mT + bias).argmax(-1)
        self.register_buffer("start", start.to(weight.device))

    def task_embeddings(self) -> Tensor:
        """Returns the table of this linear [T, d]."""
        table = self.embedding or self._shared[0]
        assert table is not None
        return table()

    def probabilities(self) -> Tensor:
        """Returns p [T, N] in fp32; one-hot where nothing is learned."""
        if self.weight is None:
            return functional.one_hot(self.start, len(self.experts)).to(self.experts.dtype)
        return torch.softmax(self._scores(self.task_embeddings(), self.weight), -1)

    def _scores(self, embeddings: Tensor, weight: Tensor) -> Tensor:
        with torch.autocast(embeddings.device.type, enabled=False):  # ranks must not depend on who asks for them
            return functional.linear(embeddings, weight, self.bias)

    def ranks(self) -> Tensor:
        """Returns every task's rank [T] int64: a function of what a checkpoint holds, nothing else."""
        return self._to_ranks(self.probabilities().argmax(-1))

    def start_ranks(self) -> Tensor:
        """Returns every task's rank [T] before training."""
        return self._to_ranks(self.start)

    def _to_ranks(self, chosen: Tensor) -> Tensor:
        return (self.experts != 0).sum(1)[chosen]

    @torch.no_grad()
    def fix(self, chosen: Tensor) -> None:
        """From here on every task keeps the given expert [T], whatever the gate says; for a checkpoint under study."""
        self.weight = self.bias = None
        self.start.copy_(chosen)

    def selection(self, p: Tensor) -> Tensor:
        """Returns p̃ [T, N]: exactly one-hot in value, the selector's rule in gradient."""
        chosen: Tensor = Chosen.apply(p, self.selector == "winner")
        # No gradient reaches the embeddings without a gate, but every parameter takes part in every step.
        return chosen if self.weight is not None else chosen + 0.0 * self.task_embeddings().sum()

    def static_core(self, task: int) -> Tensor:
        """Returns the task's core [R]."""
        return self.experts[self.probabilities()[task].argmax()]

    def gate(self, x: Tensor, context: RoutingContext, slot: str) -> Gate:
        """Returns the rows' diagonal cores."""
        return Gate("diagonal", beta=self(x, x, None, context, slot))

    def forward(self, x: Tensor, h: Tensor, scores: Tensor | None, context: RoutingContext, slot: str) -> Tensor:
        """Returns the diagonal core [B, 1, R]."""
        core = context.hold(slot, len(x), lambda: self._row_cores(context, slot, x))
        if self.training and context.contrast is not None:
            context.add_term("contrast", slot, context.contrast(slot, x, self.task_embeddings()))
        if context.records_next(slot):
            ranks = (self.experts != 0).sum(1)
            context.record(slot, Routing(((core != 0).sum(-1, keepdim=True) == ranks).float()))
        return core

    def _row_cores(self, context: RoutingContext, slot: str, x: Tensor) -> Tensor:
        """Returns every row's core, [B, 1, R]."""
        task_id = context.get("task_id", len(x))
        if task_id is None:
            raise ValueError("MoRE routes by task: the batch has no task_id; give every row the index of its task")
        return self._cores(context, slot)[task_id].view(len(x), *(1,) * (x.dim() - 2), -1)

    def _cores(self, context: RoutingContext, slot: str) -> Tensor:
        """Returns every task's core [T, R], and leaves the mean expected rank where it costs.

        In evaluation one core more: that of the mean embedding, for the task id -1 of an unknown task.
        """
        with torch.autocast(self.experts.device.type, enabled=False):
            p = self.probabilities()
            if self.training and self.costed:
                context.add_term("rank_cost", slot, (p * (self.experts != 0).sum(1)).sum(1).mean())
            cores = self.selection(p) @ self.experts
            if self.training or self.weight is None:
                return cores
            scores = self._scores(self.task_embeddings().mean(0, keepdim=True), self.weight)
            return torch.cat([cores, self.experts[scores.argmax(-1)]])


def rank_selectors(adapted: "Mapping[str, AdaptedLinear]") -> dict[str, RankSelector]:
    """Returns the rank selectors among adapted linears, by linear; none for methods that choose no ranks."""
    return {slot: layer.router for slot, layer in adapted.items() if isinstance(layer.router, RankSelector)}
