"""Mixtures of whole FFNs in an unmodified Hugging Face model: one routing for all linears of an FFN.

    y = Σ_j p_j FFN_{e_j}(x),   FFN_e with W + s B_e A_e in the place of every W; e_1 … e_k the experts of a token

Between its first linears and its last an FFN works position by position. So its entries return k copies of the batch,
in copy j every token as its j-th expert has it, the model's own code goes on with them, and the exit takes them
together:

    entry   [B, S, D] -> [k B, S, F]   W x + s B_{e_j} A_{e_j} x in copy j; the base product is made once
    exit    [k B, S, F] -> [B, S, D]   W Σ_j p_j h_j + s Σ_j p_j B_{e_j} A_{e_j} h_j; so is this, by linearity

Shapes: B batch, S sequence, D in and out of the FFN, F inside it, E experts, r rank of one.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from moe_peft.context import RoutingContext
from moe_peft.kernels.dispatch import expand, shrink
from moe_peft.kernels.reference import Core, apply_gate
from moe_peft.layers.adapted import AdaptedLinear
from moe_peft.layers.mixtures import Layout, MixtureRouter, TokenRouter

EXITS = {
    "down_proj": ("gate_proj", "up_proj", "gate_up_proj"),
    "wo": ("wi", "wi_0", "wi_1"),
    "output.dense": ("intermediate.dense",),
    "fc2": ("fc1",),
    "lin2": ("lin1",),
    "dense_4h_to_h": ("dense_h_to_4h",),
    "fc_out": ("fc_in",),
    "ffn_output": ("ffn",),
    "c_proj": ("c_fc",),
    "w2": ("w1", "w3"),
    "Wo": ("Wi",),
}
"""The last linear of an FFN and its first ones, as the model families call them."""


def ffns(names: Iterable[str]) -> dict[str, list[str]]:
    """Returns the FFNs among linears: the entries, in the order of the names, by the exit."""
    names, found = list(names), {}
    for end, starts in EXITS.items():
        for prefix in [name.removesuffix(end) for name in names if f".{name}".endswith(f".{end}")]:
            entries = [name for name in names if name in {prefix + start for start in starts}]
            if entries:
                found[prefix + end] = entries
    return found


class Choice:
    """What the first entry of an FFN decided, for its other linears to read until the exit takes it.

    Args:
        top_k: k, experts of a token.
    """

    def __init__(self, top_k: int) -> None:
        self.top_k = top_k
        self.weights: Tensor | None = None
        """[B, S, E], between the first entry and the exit."""


class Role(NamedTuple):
    """What a linear is to its FFN."""

    leads: bool
    """Whether it is the first entry, which decides for all."""
    exits: bool
    choice: Choice


def roles(names: Iterable[str], top_k: int) -> dict[str, Role]:
    """Returns the roles of all linears that belong to an FFN."""
    found = {}
    for end, starts in ffns(names).items():
        choice = Choice(top_k)
        found |= {name: Role(at == 0, name == end, choice) for at, name in enumerate([*starts, end])}
    return found


class LeadRouter(TokenRouter):
    """The router of an FFN, in its first entry.

    Args:
        choice: where the others read its weights.
        arguments: of `TokenRouter`.
    """

    def __init__(self, choice: Choice, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.choice = choice

    def decide(self, h: Tensor, scores: Tensor | None, context: RoutingContext, slot: str) -> Tensor:
        """Returns the weights of every token [..., E], and leaves them for the other linears."""
        self.choice.weights = super().decide(h, scores, context, slot)
        return self.choice.weights


class FollowRouter(MixtureRouter):
    """What an FFN's other linears have for a router: they do as the first decided.

    Args:
        choice: where its weights are.
        exits: whether this linear is the last to read them, which must not outlive it.
        layout: see `MixtureRouter`.
        rank: see `MixtureRouter`.
    """

    def __init__(self, choice: Choice, exits: bool, layout: Layout, rank: int) -> None:
        super().__init__(layout, rank)
        self.choice, self.exits = choice, exits

    def decide(self, h: Tensor, scores: Tensor | None, context: RoutingContext, slot: str) -> Tensor:
        """Returns the weights that the first entry left."""
        weights = self.choice.weights
        if weights is None:
            raise ValueError(f"{slot}: the first linear of its FFN decides for it, and was not called before it")
        if self.exits:
            self.choice.weights = None
        return weights

    def forward(self, x: Tensor, h: Tensor, scores: Tensor | None, context: RoutingContext, slot: str) -> Core:
        """Returns the core of every token."""
        return self.core(self.decide(h, scores, context, slot))


class FFNLinear(AdaptedLinear):
    """Base of the linears of a mixture of FFNs; its factors are a block of r ranks for every expert."""

    def projected(self, x: Tensor, a: Tensor) -> Tensor:
        """Returns A x [..., E r], of x with dropout."""
        return shrink(torch.dropout(x, self.active_dropout, True) if self.active_dropout else x, a).to(a.dtype)

    def copies(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """Returns each copy's weights p_j [k, ..., 1] and experts e_j, one-hot [k, ..., E], in fp32.

        Args:
            x: the layer's input, which scores read.
            h: A x.
        """
        router = self.router
        assert isinstance(router, LeadRouter | FollowRouter)
        rows = router.rows()
        g = router.decide(h, None if rows is None else shrink(x, rows), self.context, self.slot)
        kept = g.topk(min(router.choice.top_k, g.shape[-1]), -1)
        chosen = one_hot(kept.indices, g.shape[-1]).to(g.dtype)
        return kept.values.movedim(-1, 0).unsqueeze(-1), chosen.movedim(-2, 0)


class EntryLinear(FFNLinear):
    """A linear at the start of an FFN."""

    def forward(self, x: Tensor) -> Tensor:
        """Returns [k B, ..., F] from [B, ..., D]: copy by copy, every token as one of its experts has it."""
        if not self.context.enabled:
            return self.base(x)
        a, b = self.factors()
        h = self.projected(x, a)
        _, chosen = self.copies(x, h)
        y = self.base(x)
        y = y.repeat(len(chosen), *(1,) * (y.dim() - 1))
        return expand(y, apply_gate(h, chosen, "block").flatten(0, 1), b, self.scale)


class ExitLinear(FFNLinear):
    """The linear at the end of an FFN."""

    def forward(self, x: Tensor) -> Tensor:
        """Returns [B, ..., D] from the copies [k B, ..., F]: the weighted sum of all experts' outputs."""
        if not self.context.enabled:
            return self.base(x)
        a, b = self.factors()
        h = self.projected(x, a)
        p, chosen = self.copies(x, h)
        copies = len(chosen)
        first, *others = x.unflatten(0, (copies, -1))
        mixed = first
        for other, share in zip(others, p[1:].to(x.dtype), strict=True):
            mixed = mixed + share * (other - first)  # p sums to 1; so equal copies are mixed to the bit
        o = apply_gate(h.unflatten(0, (copies, -1)), p * chosen, "block").sum(0)
        return expand(self.base(mixed), o, b, self.scale)
