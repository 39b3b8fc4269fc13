"""T-REX (arXiv 2404.08985 v2): rank-one experts mixed and matched, routed per token with a semantic prior per sample.

    y = W0 x + m · B Gᵀ A x,   G = reshape(32 ω p + 4 (1 − ω) s, [r1, r2])

p: joint softmax router over the r1 · r2 pairs, per token; s: similarity of the sample to K clusters of training texts;
ω, m: one scalar gate each per adapted linear. `mode: rank1` pairs expert i with expert i (v1, Intuition-MoR1E).
Constants and start values follow the official code, except `router_init`: its zeros leave all columns of B identical
for ever where the prior does not tell them apart.
"""

import logging
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from moe_peft.embedders import Embedder
from moe_peft.layers.adapted import AdaptedLinear
from moe_peft.layers.allocation import Place
from moe_peft.layers.factors import DenseFactors
from moe_peft.layers.prior import SemanticPrior
from moe_peft.layers.routers import JointRouter
from moe_peft.methods.base import MultitaskModule
from moe_peft.sharding import gathered

log = logging.getLogger(__name__)
SWITCHED_OFF = 0.05


class TRex(MultitaskModule):
    """Mixture of rank-one experts with a semantic prior.

    Args:
        r1: input experts (rows of A); a list gives layers their own from the first to the last ([2, 4]: half each).
        r2: output experts (columns of B), or a list likewise, as long as that of r1.
        mode: "mix_and_match" (T-REX, r1 · r2 pairs) or "rank1" (Intuition-MoR1E, r1 = r2 pairs).
        clusters: K, clusters of the semantic prior; None takes the number of pairs (official), the largest where layers
            differ. Linears of another number of pairs see the prior through a trainable projection.
        embedder: what the prior reads a prompt with; default: mean of the frozen input embeddings.
        prior_norm: "none" (official: raw dot product with the centroids), "cosine" or "softmax".
        use_prior: False leaves the prior out (ablation): the router alone decides, at its own coefficient ω.
        missing_prior: an unfitted prior is an "error", or the update goes on with "token_only".
        router_init: "small" (normal, std 0.02) or "zeros" (official).
        factorised_router: r1 + r2 router outputs instead of r1 · r2.
        top_k: keep only the k largest pairs per token, renormalised; None keeps all. With k = 1 the token's part
            has no gradient (its weight is always 1).
        token_coef: factor of the token's part.
        prior_coef: factor of the prior's part.
        gate_slope: slope of the gates ω and m.
        diagonal: d in y = W0 x + m · B (G + d I)ᵀ A x; 0 is official. G is near uniform for long, so of rank one: with
            d the update has all min(r1, r2) ranks from the first step on.
        scale: constant factor of the update (the official code ignores α).
        dropout: on the adapter's input; the router reads it before dropout.
        common: the arguments of `MultitaskModule`.
    """

    default_rates: ClassVar[Mapping[str, float]] = {"gates": 5e-5}
    """At a slope of 100, a step of 5e-3 switches a layer off."""
    sized_by: ClassVar[str] = "r2"

    def __init__(
        self,
        r1: int | list[int] = 4,
        r2: int | list[int] = 8,
        mode: Literal["mix_and_match", "rank1"] = "mix_and_match",
        clusters: int | None = None,
        embedder: Embedder | None = None,
        prior_norm: Literal["none", "cosine", "softmax"] = "none",
        use_prior: bool = True,
        missing_prior: Literal["error", "token_only"] = "error",
        router_init: Literal["small", "zeros"] = "small",
        factorised_router: bool = False,
        top_k: int | None = None,
        token_coef: float = 32.0,
        prior_coef: float = 4.0,
        gate_slope: float = 100.0,
        diagonal: float = 0.0,
        scale: float = 1.0,
        dropout: float = 0.0,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        rank1 = mode == "rank1"
        sizes = allocated(r1, r2)
        pairs = [own if rank1 else own * other for own, other in sizes]
        if rank1 and (r1 != r2 or factorised_router):
            raise ValueError(
                f"mode rank1 pairs expert i with expert i: set r1 = r2 (now {r1}, {r2}) and no factorised_router"
            )
        if top_k is not None and not 1 <= top_k <= min(pairs):
            raise ValueError(f"top_k: {top_k} is not between 1 and the {min(pairs)} pairs")
        self.r1, self.r2, self.rank1, self.top_k = r1, r2, rank1, top_k
        self.clusters = (max(pairs) if clusters is None else clusters) if use_prior else None
        self.missing_prior, self.router_init, self.factorised_router = missing_prior, router_init, factorised_router
        self.token_coef, self.prior_coef, self.gate_slope = token_coef, prior_coef, gate_slope
        self.diagonal, self.scale, self.dropout = diagonal, scale, dropout
        if self.clusters is not None:
            self.prior = SemanticPrior(embedder, self.clusters, prior_norm)
        self._warned: set[str] = set()

    def adapt(self, base: nn.Linear, slot: str) -> AdaptedLinear:
        """Rank-one experts of both sides, joined by the joint router."""
        device, (r1, r2) = base.weight.device, self.sizes(slot)
        router = JointRouter(
            base.in_features,
            r1,
            r2,
            rank1=self.rank1,
            clusters=self.clusters,
            init=self.router_init,
            factorised=self.factorised_router,
            top_k=self.top_k,
            token_coef=self.token_coef,
            prior_coef=self.prior_coef,
            gate_slope=self.gate_slope,
            diagonal=self.diagonal,
            missing_prior=self.missing_prior,
            device=device,
        )
        factors = DenseFactors(base.in_features, base.out_features, r1, r2, device)
        return AdaptedLinear(base, factors, router, self.scale, self.dropout, self.context, slot)

    def sizes(self, slot: str) -> tuple[int, int]:
        """Returns a linear's r1 and r2."""
        place = self.places.get(slot, Place())
        return place.of(self.r1), place.of(self.r2)

    def expert_names(self, layer: str, experts: int) -> list[str]:
        """Names pairs "i,j": input expert i with output expert j; in mode rank1 experts by their number."""
        if self.rank1:
            return super().expert_names(layer, experts)
        r1, r2 = self.sizes(layer)
        return [f"{i},{j}" for i in range(r1) for j in range(r2)]

    @torch.no_grad()
    def routing_gates(self) -> dict[str, tuple[float, float]]:
        """Returns ω and m of every adapted linear."""
        values = {}
        for slot, layer in self.adapted.items():
            assert isinstance(layer.router, JointRouter)
            with gathered(layer.router):
                omega, magnitude = layer.router.gates()
                values[slot] = omega.item(), magnitude.item()
        return values

    def diagnostics(self) -> dict[str, float]:
        """ω and m of every adapted linear; warns once about a linear whose m has fallen below 0.05."""
        values = {}
        for slot, (omega, magnitude) in self.routing_gates().items():
            values |= {f"omega/{slot}": omega, f"magnitude/{slot}": magnitude}
            if magnitude < SWITCHED_OFF and slot not in self._warned:
                self._warned.add(slot)
                log.warning("%s has switched itself off (m = %.3f): lower lr.gates or gate_slope", slot, magnitude)
        return values


def allocated(r1: int | list[int], r2: int | list[int]) -> list[tuple[int, int]]:
    """Returns the sizes that layers have, from the first to the last.

    Raises:
        ValueError: numbers below 1, no numbers, or lists of two lengths.
    """
    ones, twos = (own if isinstance(own, list) else [own] for own in (r1, r2))
    if min([*ones, *twos], default=0) < 1 or not ones or not twos:
        raise ValueError(f"r1, r2: {r1} and {r2}, both must be at least 1")
    if isinstance(r1, list) and isinstance(r2, list) and len(r1) != len(r2):
        raise ValueError(f"r1, r2: {r1} and {r2} cut the layers differently; give lists of the same length")
    length = max(len(ones), len(twos))
    return [(Place(at, length).of(ones), Place(at, length).of(twos)) for at in range(length)]
