"""Routers of LoRA mixtures: weights g of E experts, laid out as the core that their factors need.

    block          A [E r, D]   B [O, E r]   C = diag(g ⊗ 1_r)          expert e is B_e A_e
    tall           A [r, D]     B [O, E r]   C = g ⊗ I_r                the experts share A
    tall_diagonal  A [r, D]     B [O, E r]   C = diag(g_1) … diag(g_E)  stacked: g has a number for each rank
    rank           A [E, D]     B [O, E]     C = diag(g)                every rank is an expert

Where scores come from is the router's kind (a token's own state, its task, …), how they become weights its `Rule`.
Shapes: B batch, S sequence, D in, E experts, r rank, T tasks.
"""

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from moe_peft.context import Routing, RoutingContext
from moe_peft.kernels.dispatch import shrink
from moe_peft.kernels.reference import Core, Gate, Tall
from moe_peft.layers.routers import Router

Layout = Literal["block", "tall", "tall_diagonal", "rank"]
Rule = Callable[[Tensor], Tensor]
"""Scores [..., E] to weights [..., E], both fp32; an expert that is not chosen has weight 0."""


def dense(scores: Tensor) -> Tensor:
    """The softmax over all experts."""
    return scores.softmax(-1)


def top_k(k: int) -> Rule:
    """The softmax over the k largest scores of every token: its experts' weights sum to 1."""

    def rule(scores: Tensor) -> Tensor:
        kept = scores.topk(min(k, scores.shape[-1]), -1)
        return torch.zeros_like(scores).scatter(-1, kept.indices, kept.values.softmax(-1))

    return rule


class MixtureRouter(Router):
    """Base of the routers of mixtures.

    Args:
        layout: how weights become a core (see the module).
        rank: r of every expert; of no meaning for the layout "rank".
    """

    def __init__(self, layout: Layout, rank: int) -> None:
        super().__init__()
        self.layout: Layout = layout
        self.rank = rank

    def core(self, g: Tensor) -> Tensor | Tall:
        """Lays weights [..., E] ([..., E * r] for tall_diagonal, expert by expert) out as a core."""
        if self.layout == "rank":
            return g
        if self.layout == "block":
            return g.repeat_interleave(self.rank, -1)
        return Tall(g.unsqueeze(-1) if self.layout == "tall" else g.unflatten(-1, (-1, self.rank)))

    def by_expert(self, g: Tensor) -> Tensor:
        """Returns one weight for each expert [..., E], the mean over its ranks where those have their own."""
        return g.unflatten(-1, (-1, self.rank)).mean(-1) if self.layout == "tall_diagonal" else g


class TokenRouter(MixtureRouter):
    """Scores every token by a linear map without bias, W [E, D] of x or [E, r] of A x.

    Args:
        width: D, or r where it reads A x.
        scores: how many scores a token gets, E for most rules.
        layout: see `MixtureRouter`.
        rank: see `MixtureRouter`.
        rule: how scores become weights.
        reads: the layer's input "x", or "Ax".
        std: of the normal distribution that W starts from; None starts Kaiming-uniform (a = √5).
        traced: leave the scores as the part "scores" of a loss term while training (see `methods.mixture_losses`).
        device: where to create the parameters.
    """

    one: Tensor

    def __init__(
        self,
        width: int,
        scores: int,
        layout: Layout,
        rank: int,
        rule: Rule = dense,
        reads: Literal["x", "Ax"] = "x",
        std: float | None = None,
        traced: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(layout, rank)
        self.reads: Literal["x", "Ax"] = reads
        self.rule, self.traced = rule, traced
        self.weight = nn.Parameter(torch.empty(scores, width, device=device, dtype=torch.float32))
        if std is None:
            nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        else:
            nn.init.normal_(self.weight, std=std)
        self.register_buffer("one", torch.ones(1, device=device, dtype=torch.float32), persistent=False)

    def rows(self) -> Tensor | None:
        """Returns W where it reads x."""
        return self.weight if self.reads == "x" else None

    def gate(self, x: Tensor, context: RoutingContext, slot: str) -> Gate | None:
        """Returns a dense softmax over blocks of x; every other core is made by `forward`."""
        plain = self.rule is dense and self.layout in ("block", "rank") and self.reads == "x"
        if not plain or (self.traced and self.training):
            return None
        if context.records_next(slot):
            with torch.no_grad():
                context.record(slot, Routing(self.rule(shrink(x, self.weight).to(self.weight.dtype))))
        return Gate("block" if self.layout == "block" else "diagonal", self.weight, self.one)

    def forward(self, x: Tensor, h: Tensor, scores: Tensor | None, context: RoutingContext, slot: str) -> Core:
        """Returns the core of every token."""
        return self.core(self.decide(h, scores, context, slot))

    def decide(self, h: Tensor, scores: Tensor | None, context: RoutingContext, slot: str) -> Tensor:
        """Returns the weights of every token [..., E], and shows them to those who ask (see `forward`)."""
        if scores is None:
            with torch.autocast(h.device.type, enabled=False):
                scores = nn.functional.linear(h.to(self.weight.dtype), self.weight)
        scores = scores.to(self.weight.dtype)
        if self.traced and self.training:
            context.add_term("scores", slot, scores)
        g = self.rule(scores)
        context.record(slot, Routing(self.by_expert(g)))
        return g

    def choose(self, scores: Tensor) -> Tensor:
        """Returns which experts a token uses, bool like the scores: its largest alone where all have a weight."""
        g = self.rule(scores)
        return g == g.amax(-1, keepdim=True) if self.rule is dense else g > 0


class TaskRouter(MixtureRouter):
    """Base of routers that decide by a row's task alone: their update can be merged, task by task."""

    def weights(self) -> Tensor:
        """Returns every task's weights [T, E] in fp32."""
        raise TypeError(f"{type(self).__name__} must implement weights()")

    def static_core(self, task: int) -> Tensor:
        """Returns the task's core [R] or [Q, R]."""
        core = self.core(self.weights()[task])
        return core.dense(self.rank) if isinstance(core, Tall) else core

    def gate(self, x: Tensor, context: RoutingContext, slot: str) -> Gate | None:
        """Returns the rows' weights where the core is a diagonal."""
        if self.layout not in ("block", "rank"):
            return None
        return Gate("block" if self.layout == "block" else "diagonal", beta=self.row_weights(x, context, slot))

    def row_weights(self, x: Tensor, context: RoutingContext, slot: str) -> Tensor:
        """Returns every row's weights [B, 1, E], with as many dimensions as x."""
        tasks = context.get("task_id", len(x))
        assert tasks is not None, "the method's `routed_tasks` asks for them"
        g = context.hold(slot, len(x), lambda: self.weights()[tasks])
        g = g.view(len(x), *(1,) * (x.dim() - 2), -1)
        context.record(slot, Routing(self.by_expert(g)))
        return g

    def forward(self, x: Tensor, h: Tensor, scores: Tensor | None, context: RoutingContext, slot: str) -> Core:
        """Returns the rows' cores."""
        return self.core(self.row_weights(x, context, slot))
