"""Routers: modules that turn an input row, and the facts of its batch, into the core of the low-rank update.

A token-level router stores rows that read the layer's input (`rows()`), so that the adapted linear can project them
together with A in one product; the router then sees only the resulting scores. Shapes: B batch, S sequence, E experts
(or pairs), R rows of A, Q columns of B, D in, K clusters.
"""

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from moe_peft.context import Routing, RoutingContext
from moe_peft.kernels.dispatch import shrink
from moe_peft.kernels.reference import Core, Gate


class Router(nn.Module):
    """Base of all routers.

    Attributes:
        gate_names: names of the router's own parameters that are scalar gates: they form the optimizer group "gates";
            its other parameters form "routers".
    """

    gate_names: ClassVar[tuple[str, ...]] = ()

    def rows(self) -> Tensor | None:
        """Returns the rows [E, D] that score an input, or None for a router that does not read it."""
        return None

    def gate(self, x: Tensor, context: RoutingContext, slot: str) -> Gate | None:
        """Returns the gate from which the core follows, where it has such a form: the fast way past `forward`.

        Args:
            x: [B, S, D] the layer's input, before dropout.
            context: the batch's facts.
            slot: the adapted linear's name in the model.
        """
        return None

    def static_core(self, task: int) -> Tensor | None:
        """Returns the core [R] or [Q, R] of a task's rows where no input enters it, so that it can be merged.

        Raises:
            ValueError: the router reads its input.
        """
        raise ValueError(f"{type(self).__name__} reads its input: such an adapter is no fixed matrix per task")

    def forward(self, x: Tensor, h: Tensor, scores: Tensor | None, context: RoutingContext, slot: str) -> Core:
        """Returns the core for these rows (see `kernels.reference` for its forms), in fp32.

        Args:
            x: [B, S, D] the layer's input, before dropout.
            h: [B, S, R] rank-space activations A x.
            scores: [B, S, E] = x rows()ᵀ, or None.
            context: the batch's facts; the routing is recorded there under `slot`.
            slot: the adapted linear's name in the model.
        """
        raise TypeError(f"{type(self).__name__} must implement forward(x, h, scores, context, slot)")


class Blend(torch.autograd.Function):
    """α = t m ω and β = c m (1 - ω) s with ω = σ(a w_ω), m = σ(a w_m): one node, where autograd would make a dozen."""

    @staticmethod
    def forward(
        ctx: Any, w_omega: Tensor, w_m: Tensor, s: Tensor | None, t: float, c: float, a: float
    ) -> tuple[Tensor, Tensor]:
        """Returns α [1] and β, of the shape of s; the whole factor c m (1 - ω) [1] where there is no s."""
        omega, m = torch.sigmoid(a * torch.cat([w_omega, w_m])).split(1)
        both = omega * m
        rest = c * (m - both)
        ctx.save_for_backward(omega, m, s, rest)
        ctx.factors = t, c, a
        return t * both, rest if s is None else rest * s

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dalpha: Tensor, dbeta: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        """Returns the gradients of w_ω, w_m and s."""
        (omega, m, s, rest), (t, c, a) = ctx.saved_tensors, ctx.factors
        drest = c * (dbeta if s is None else torch.dot(dbeta.flatten(), s.flatten()))
        dboth = t * dalpha - drest
        domega, dm = m * dboth, torch.addcmul(drest, omega, dboth)
        gates = (a * torch.ops.aten.sigmoid_backward(d, own) for d, own in ((domega, omega), (dm, m)))
        return *gates, rest * dbeta if ctx.needs_input_grad[2] else None, None, None, None


class JointRouter(Router):
    """T-REX's router: one softmax over all pairs of input and output experts, mixed with a semantic prior.

        p = softmax(x W_rᵀ)                  joint over the r1 * r2 pairs
        ω = σ(slope * w_ω), m = σ(slope * w_m)
        g = token_coef * ω * p + prior_coef * (1 - ω) * s
        C = m * (G + diagonal * I)ᵀ,  G = reshape(g, [r1, r2]); rank-one mode: C = m * (diag(g) + diagonal * I)

    arXiv 2404.08985; constants, additive fusion and the scalar gates follow the official code (spec: T-REX section 1).

    Args:
        in_features: D.
        r1: input experts (rows of A).
        r2: output experts (columns of B).
        rank1: pair expert i of A with expert i of B only (Intuition-MoR1E); r1 = r2 = E.
        clusters: K of the semantic prior, None for a method without prior. K = E maps cluster k to pair
            (k div r2, k mod r2); another K goes through a trainable projection [E, K].
        init: "small" (normal, std 0.02) or "zeros" (official: leaves B's columns identical for ever without a prior).
        factorised: score r1 + r2 experts instead of r1 * r2 pairs; p is the outer product of two softmaxes.
        top_k: keep the k largest p of every token and renormalise them to sum 1; None keeps all.
        token_coef: factor of the token's part (official 32).
        prior_coef: factor of the prior's part (official 4).
        gate_slope: slope of both gates (official 100).
        diagonal: constant part of pairs (i, j) with i = j modulo the smaller side (official 0; not in the paper). A
            near uniform G has rank one, with it the update has all ranks from the first step on.
        missing_prior: without a prior in the context, "error" or "token_only" (the prior's part is left out).
        device: where to create the parameters.
    """

    gate_names = ("omega", "magnitude")

    def __init__(
        self,
        in_features: int,
        r1: int,
        r2: int,
        rank1: bool = False,
        clusters: int | None = None,
        init: str = "small",
        factorised: bool = False,
        top_k: int | None = None,
        token_coef: float = 32.0,
        prior_coef: float = 4.0,
        gate_slope: float = 100.0,
        diagonal: float = 0.0,
        missing_prior: str = "error",
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.r1, self.r2, self.rank1, self.factorised, self.top_k = r1, r2, rank1, factorised, top_k
        self.token_coef, self.prior_coef, self.gate_slope = token_coef, prior_coef, gate_slope
        self.diagonal, self.missing_prior, self.clusters = diagonal, missing_prior, clusters
        self.experts = r1 if rank1 else r1 * r2
        outputs = r1 + r2 if factorised else self.experts
        self.weight = nn.Parameter(torch.zeros(outputs, in_features, device=device, dtype=torch.float32))
        if init == "small":
            nn.init.normal_(self.weight, std=0.02)
        self.omega = nn.Parameter(torch.zeros(1, device=device, dtype=torch.float32))
        self.magnitude = nn.Parameter(torch.zeros(1, device=device, dtype=torch.float32))
        self.projection: nn.Parameter | None = None
        if clusters is not None and clusters != self.experts:
            self.projection = nn.Parameter(torch.empty(self.experts, clusters, device=device, dtype=torch.float32))
            nn.init.kaiming_uniform_(self.projection, a=math.sqrt(5))

    def rows(self) -> Tensor:
        """Returns W_r: [E, D], or [r1 + r2, D] when factorised."""
        return self.weight

    def gates(self) -> tuple[Tensor, Tensor]:
        """Returns ω (share of the token's part) and m (size of the whole update), each [1] in (0, 1)."""
        return torch.sigmoid(self.gate_slope * self.omega), torch.sigmoid(self.gate_slope * self.magnitude)

    def probabilities(self, scores: Tensor) -> Tensor:
        """Returns p [B, S, E] from scores [B, S, outputs]: sums to one over all pairs jointly."""
        if self.factorised:
            p_in, p_out = scores[..., : self.r1].softmax(-1), scores[..., self.r1 :].softmax(-1)
            p = (p_in.unsqueeze(-1) * p_out.unsqueeze(-2)).flatten(-2)
        else:
            p = scores.softmax(-1)
        if self.top_k is None:
            return p
        kept = torch.zeros_like(p).scatter(-1, p.topk(self.top_k, -1).indices, 1.0)
        p = p * kept
        return p / p.sum(-1, keepdim=True)

    def prior(self, context: RoutingContext, rows: int) -> Tensor | None:
        """Returns the batch's prior over pairs [B, E] in fp32, or None where that is allowed."""
        if self.clusters is None:
            return None
        s = context.get("prior", rows)
        if s is None:
            if self.missing_prior == "token_only":
                return None
            raise ValueError(
                "T-REX ran without a semantic prior: call the module's forward, which computes it, "
                "or set missing_prior: token_only"
            )
        s = s.to(self.weight.dtype)
        return s if self.projection is None else s @ self.projection.mT

    def gate(self, x: Tensor, context: RoutingContext, slot: str) -> Gate | None:
        """Returns g = α p + β; None where p is no plain softmax. The kernels never make g, so it is recorded here."""
        if self.top_k is not None or self.factorised:
            return None
        s = self.spread_prior(context, x)
        if context.records_next(slot):
            with torch.no_grad():
                context.record(slot, Routing(self.weights(shrink(x, self.weight), s)))
        factors = self.token_coef, self.prior_coef, self.gate_slope
        alpha, beta = Blend.apply(self.omega, self.magnitude, s, *factors)
        beta = None if s is None else beta
        if self.diagonal:
            constant = (self.gates()[1] * self.constant(x.device)).view(*(1,) * (x.dim() - 1), -1)
            beta = constant if beta is None else beta + constant
        return Gate("diagonal" if self.rank1 else "matrix", self.weight, alpha, beta)

    def constant(self, device: torch.device) -> Tensor:
        """Returns what the diagonal adds to g [E] on the way to the core; it is no routing, and not recorded."""
        if self.rank1:
            return torch.full((self.experts,), self.diagonal, dtype=self.weight.dtype, device=device)
        small = min(self.r1, self.r2)
        i, j = torch.arange(self.r1, device=device) % small, torch.arange(self.r2, device=device) % small
        return self.diagonal * (i.unsqueeze(-1) == j).to(self.weight.dtype).flatten()

    def spread_prior(self, context: RoutingContext, x: Tensor) -> Tensor | None:
        """Returns the prior with as many dimensions as x: [B, 1, E]."""
        s = self.prior(context, len(x))
        return None if s is None else s.reshape(len(x), *(1,) * (x.dim() - 2), -1)

    def weights(self, scores: Tensor, s: Tensor | None) -> Tensor:
        """Returns g without m and the diagonal [B, S, E], of the scores [B, S, outputs] and the prior."""
        omega = self.gates()[0]
        g = self.token_coef * omega * self.probabilities(scores.to(self.weight.dtype))
        return g if s is None else g + self.prior_coef * (1 - omega) * s

    def forward(self, x: Tensor, h: Tensor, scores: Tensor | None, context: RoutingContext, slot: str) -> Tensor:
        """Returns C: [B, S, r2, r1], or the diagonal [B, S, E] in rank-one mode."""
        assert scores is not None
        g = self.weights(scores, self.spread_prior(context, x))
        context.record(slot, Routing(g))
        g = self.gates()[1] * (g + self.constant(x.device) if self.diagonal else g)
        return g if self.rank1 else g.unflatten(-1, (self.r1, self.r2)).mT
