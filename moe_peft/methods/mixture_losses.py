"""Losses on the routing of mixtures: each is computed for every router by itself, then averaged.

Joined over routers first, two that collapsed onto different experts look perfectly balanced together. Padding does not
count, and shares are those of the whole micro-batch, over all ranks. Shapes: B batch, S sequence, E experts, N routers.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, distributed

from moe_peft.batch import Batch, real_tokens
from moe_peft.layers.mixtures import TokenRouter

if TYPE_CHECKING:
    from moe_peft.methods.base import MultitaskModule


class Trace(NamedTuple):
    """What one router did with a batch."""

    scores: Tensor
    """[B, S, E] fp32, with their gradient."""
    weights: Tensor
    """[B, S, E], 0 for experts that were not chosen."""
    real: Tensor
    """[B, S] 1 for tokens, 0 for padding, in the dtype of the scores."""
    tokens: Tensor
    """[] tokens of all ranks / ranks."""


def traces(module: "MultitaskModule", batch: Batch) -> list[Trace]:
    """Takes the scores that this batch's routers left (`TokenRouter.traced`)."""
    found, seq2seq = [], module.backbone.kind == "seq2seq"
    for slot, scores in module.context.terms("scores").items():
        router = module.adapted[slot].router
        assert isinstance(router, TokenRouter)
        real = real_tokens(batch, slot, seq2seq).to(scores.dtype)
        found.append((scores, router.rule(scores), real))
    tokens = over_ranks(torch.stack([real.sum() for _, _, real in found]))
    return [
        Trace(scores, weights, real, own) for (scores, weights, real), own in zip(found, tokens / ranks(), strict=True)
    ]


def ranks() -> int:
    """Returns how many processes train together."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def over_ranks(own: Tensor) -> Tensor:
    """Returns the sum of a tensor over all ranks, without a gradient."""
    own = own.detach().clone()
    if ranks() > 1:
        distributed.all_reduce(own)
    return own


def mean(trace: Trace, values: Tensor) -> Tensor:
    """Returns this rank's part of the mean over all real tokens [...] of values [B, S, ...]; the ranks' mean is it."""
    real = trace.real.view(*trace.real.shape, *(1,) * (values.dim() - 2))
    return (values * real).sum((0, 1)) / trace.tokens


def load_balance(found: Sequence[Trace]) -> Tensor:
    """Returns the mean over routers of E Σ_e f_e P_e (Switch, arXiv 2101.03961, eq. 4).

    f_e is the share of all choices that fell on expert e, P_e its mean probability: 1 where all experts are used alike,
    E where one serves all, whatever k is. Mixtral's form, with f_e a share of tokens, is k times as large.
    """
    used = [mean(trace, (trace.weights > 0).to(trace.scores.dtype)) for trace in found]
    parts = over_ranks(torch.cat(used)).split([len(own) for own in used])
    values = [
        len(own) * (own / own.sum() * mean(trace, trace.scores.softmax(-1))).sum()
        for trace, own in zip(found, parts, strict=True)
    ]
    return torch.stack(values).mean()


def z_loss(found: Sequence[Trace]) -> Tensor:
    """Returns the mean over routers and tokens of the squared log-sum-exp of the scores (arXiv 2202.08906, eq. 5)."""
    return torch.stack([mean(trace, trace.scores.logsumexp(-1).square()) for trace in found]).mean()
