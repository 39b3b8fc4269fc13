"""Losses on the routing of mixtures: each is computed for every router by itself, then averaged.

Joined over routers first, two that collapsed onto different experts look perfectly balanced together. Padding does not
count, and shares are those of the whole micro-batch, over all ranks. Shapes: B batch, S sequence, E experts.
"""

from collections.abc import Mapping
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
    chosen: Tensor
    """[B, S, E] 1 for the experts that a token chose (see `TokenRouter.choose`), in the dtype of the scores."""
    real: Tensor
    """[B, S] 1 for tokens, 0 for padding, in the dtype of the scores."""
    tokens: Tensor
    """[] tokens of all ranks / ranks."""


def traces(module: "MultitaskModule", batch: Batch) -> dict[str, Trace]:
    """Takes the scores that this batch's routers left (`TokenRouter.traced`), by linear; they leave none untrained."""
    found, seq2seq = {}, module.backbone.kind == "seq2seq"
    for slot, scores in module.context.terms("scores").items():
        router = module.adapted[slot].router
        assert isinstance(router, TokenRouter)
        real = real_tokens(batch, slot, seq2seq).to(scores.dtype)
        scores = scores.reshape(*real.shape, -1)  # some models hand their tokens to linears without rows
        found[slot] = scores, router.choose(scores.detach()).to(scores.dtype), real
    if not found:
        return {}
    tokens = over_ranks(torch.stack([real.sum() for _, _, real in found.values()])) / ranks()
    return {
        slot: Trace(scores, chosen, real, own)
        for (slot, (scores, chosen, real)), own in zip(found.items(), tokens, strict=True)
    }


def ranks() -> int:
    """Returns how many processes train together."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def over_ranks(own: Tensor) -> Tensor:
    """Returns the sum of a tensor over all ranks, without a gradient."""
    own = own.detach().clone()
    if ranks() > 1:
        distributed.all_reduce(own)
    return own


def joined(own: Tensor) -> Tensor:
    """Returns the sum of a tensor over all ranks, with a gradient whose mean over the ranks is the sum's."""
    return over_ranks(own) + ranks() * (own - own.detach())


def mean(trace: Trace, values: Tensor) -> Tensor:
    """Returns this rank's part of the mean over all real tokens [...] of values [B, S, ...]; the ranks' mean is it."""
    real = trace.real.view(*trace.real.shape, *(1,) * (values.dim() - 2))
    return (values * real).sum((0, 1)) / trace.tokens


def load_balance(found: Mapping[str, Trace]) -> Tensor:
    """Returns the mean over routers of E Σ_e f_e P_e (Switch, arXiv 2101.03961, eq. 4).

    f_e is the share of all choices that fell on expert e, P_e its mean probability: 1 where all experts are used alike,
    E where one serves all, whatever k is. Mixtral's form, with f_e a share of tokens, is k times as large.
    """
    used = [mean(trace, trace.chosen) for trace in found.values()]
    parts = over_ranks(torch.cat(used)).split([len(own) for own in used])
    values = [
        len(own) * (own / own.sum() * mean(trace, trace.scores.softmax(-1))).sum()
        for trace, own in zip(found.values(), parts, strict=True)
    ]
    return torch.stack(values).mean()


def z_loss(found: Mapping[str, Trace]) -> Tensor:
    """Returns the mean over routers and tokens of the squared log-sum-exp of the scores (arXiv 2202.08906, eq. 5)."""
    return torch.stack([mean(trace, trace.scores.logsumexp(-1).square()) for trace in found.values()]).mean()


def spread(values: list[Tensor]) -> Tensor:
    """Returns the mean over routers of the squared coefficient of variation of their values, over all ranks.

    Args:
        values: of one router each, any number on every rank, each weighing as much.
    """
    count = over_ranks(torch.stack([own.new_tensor(own.numel()) for own in values]))
    middle = joined(torch.stack([own.sum() for own in values])) / count
    # Of the sum of squares the mean is the minimum, so that no gradient passes through it.
    apart = [(own - center).square().sum() for own, center in zip(values, middle.detach(), strict=True)]
    return (joined(torch.stack(apart)) / (count - 1) / (middle.square() + 1e-10)).mean()
