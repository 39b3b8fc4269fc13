"""Routers that decide by a row's task, or by a preference among tasks: no token enters.

    EmbeddingRouter     g(t) = softmax(W e_t)                                       MOELoRA
    TransformRouter     g(t) = softmax(θ_t / τ),  C = g(t) ⊗ Λ_t                    MTL-LoRA
    SkillRouter         w(t) = z / Σ z,  z = σ(θ_t), or drawn around it             Polytropon, MHR
    PreferenceRouter    g = λ, from outside                                         PaLoRA

Shapes: B batch, S sequence, E experts, T tasks, r rank, q splits.
"""

import math

import torch
from torch import Tensor, nn
from torch.distributions.relaxed_bernoulli import LogitRelaxedBernoulli

from moe_peft.context import Routing, RoutingContext
from moe_peft.kernels.reference import Core, Gate, Tall
from moe_peft.layers.mixtures import Layout, TaskRouter
from moe_peft.layers.rank_selector import TaskEmbedding
from moe_peft.layers.routers import Router

PREFERENCE = "preference"
"""The fact that a `PreferenceRouter` asks for: every row's weights [B, T]."""


class EmbeddingRouter(TaskRouter):
    """Weighs experts by a linear map, without bias, of a task's embedding.

    Args:
        tasks: T.
        width: of an embedding.
        experts: E.
        layout: see `MixtureRouter`.
        rank: see `MixtureRouter`.
        device: where to create the parameters.
    """

    def __init__(
        self, tasks: int, width: int, experts: int, layout: Layout, rank: int, device: torch.device | None = None
    ) -> None:
        super().__init__(layout, rank)
        self.embedding = TaskEmbedding(tasks, width, device)
        nn.init.normal_(self.embedding.weight)  # torch's own, as in the official code
        self.weight = nn.Parameter(torch.empty(experts, width, device=device, dtype=torch.float32))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def weights(self) -> Tensor:
        """Returns every task's softmax over experts [T, E]."""
        table = self.embedding()
        with torch.autocast(table.device.type, enabled=False):
            return nn.functional.linear(table, self.weight).softmax(-1)


class TransformRouter(TaskRouter):
    """Weighs experts by a task's own logits, after a task's own transform of rank space; that starts at the identity.

    Args:
        tasks: T.
        experts: E.
        rank: r.
        full: transforms are matrices, Λ [T, r, r]; otherwise diagonals [T, r].
        temperature: τ.
        device: where to create the parameters.
    """

    def __init__(
        self, tasks: int, experts: int, rank: int, full: bool, temperature: float, device: torch.device | None = None
    ) -> None:
        super().__init__("tall", rank)
        self.full, self.temperature = full, temperature
        self.logits = nn.Parameter(torch.empty(tasks, experts, device=device, dtype=torch.float32))
        nn.init.kaiming_uniform_(self.logits, a=math.sqrt(5))
        identity = torch.eye(rank, device=device) if full else torch.ones(rank, device=device)
        self.transform = nn.Parameter(identity.float().repeat(tasks, *(1,) * identity.dim()))

    def weights(self) -> Tensor:
        """Returns every task's softmax over experts [T, E]."""
        return (self.logits / self.temperature).softmax(-1)

    def transformed(self, g: Tensor, transform: Tensor) -> Tensor | Tall:
        """Returns the core of weights [..., E] and transforms [..., r, r] or [..., r]."""
        if self.full:
            return (g[..., None, None] * transform.unsqueeze(-3)).flatten(-3, -2)
        return Tall(g.unsqueeze(-1) * transform.unsqueeze(-2))

    def static_core(self, task: int) -> Tensor:
        """Returns the task's core [E r, r]."""
        core = self.transformed(self.weights()[task], self.transform[task])
        return core.dense(self.rank) if isinstance(core, Tall) else core

    def forward(self, x: Tensor, h: Tensor, scores: Tensor | None, context: RoutingContext, slot: str) -> Core:
        """Returns the rows' cores."""
        g = self.row_weights(x, context, slot)
        transform = self.transform[context.get("task_id", len(x))]
        return self.transformed(g, transform.view(*g.shape[:-1], *transform.shape[1:]))


class SkillRouter(Router):
    """Mixes the parameters of skills, not their outputs: there is no core.

    Args:
        tasks: T.
        skills: E.
        splits: q; every slice of the input and of the output has a mixture of its own.
        device: where to create the parameters.
    """

    def __init__(self, tasks: int, skills: int, splits: int, device: torch.device | None = None) -> None:
        super().__init__()
        self.splits = splits
        self.logits = nn.Parameter(torch.empty(tasks, splits * skills, device=device, dtype=torch.float32))
        nn.init.uniform_(self.logits, -1e-3, 1e-3)

    def weights(self, tasks: Tensor, drawn: bool) -> Tensor:
        """Returns the weights [n, q, E] of tasks [n].

        Args:
            tasks: their ids.
            drawn: sample around the sigmoids, for every entry of `tasks` anew, from torch's own generator.
        """
        logits = self.logits[tasks].unflatten(-1, (self.splits, -1))
        if drawn:  # RelaxedBernoulli itself would look at the values, whatever it is told
            logits = LogitRelaxedBernoulli(logits.new_ones(()), logits=logits, validate_args=False).rsample()
        z = logits.sigmoid()
        return z / (z.sum(-1, keepdim=True) + 1e-12)

    def static_core(self, task: int) -> None:
        """Returns the identity."""

    def gate(self, x: Tensor, context: RoutingContext, slot: str) -> Gate:
        """Returns the identity."""
        return Gate()


class PreferenceRouter(TaskRouter):
    """Weighs one expert per task by what the module published (`PREFERENCE`).

    Args:
        tasks: T.
        layout: see `MixtureRouter`.
        rank: see `MixtureRouter`.
        device: where to create the table.
    """

    table: Tensor
    """[T, T]: every task's preference where none is drawn; its own expert alone, unless told otherwise."""

    def __init__(self, tasks: int, layout: Layout, rank: int, device: torch.device | None = None) -> None:
        super().__init__(layout, rank)
        self.register_buffer("table", torch.eye(tasks, device=device, dtype=torch.float32), persistent=False)

    def weights(self) -> Tensor:
        """Returns the table."""
        return self.table

    def row_weights(self, x: Tensor, context: RoutingContext, slot: str) -> Tensor:
        """Returns every row's preference [B, 1, T], with as many dimensions as x."""
        g = context.get(PREFERENCE, len(x))
        assert g is not None, "the method's `routing_facts` has them"
        g = g.view(len(x), *(1,) * (x.dim() - 2), -1)
        context.record(slot, Routing(g))
        return g
