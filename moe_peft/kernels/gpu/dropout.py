"""Seeded dropout: which elements of x are kept, a pure function of (seed, token, column).

Whichever kernel asks, and in whatever tiles, gets the same answer, so that backward needs no stored mask. One Philox
call gives four random numbers, for four columns side by side.
"""
# ruff: noqa: ANN001, ANN201

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_peft.kernels.eager import Plan

ROUNDS = tl.constexpr(7)
"""The fewest rounds of Philox that pass all tests of BigCrush (Salmon et al. 2011, Table 2)."""


def draw(x: Tensor, plan: Plan) -> Tensor | None:
    """Returns the seed [1] of what dropout keeps; None without dropout."""
    return torch.randint(2**62, (1,), device=x.device) if plan.dropout else None


@triton.jit
def kept(seed, tokens, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DROPOUT: tl.constexpr):
    """Returns whether x[tokens, column : column + COLUMNS] is kept.

    Args:
        seed: int64 scalar.
        tokens: [ROWS] numbers of tokens in the whole batch.
        column: the first column, a multiple of four.
        ROWS: size of `tokens`.
        COLUMNS: columns of the tile.
        DROPOUT: probability of an element to be dropped.
    """
    fours = column // 4 + tl.arange(0, COLUMNS // 4)
    zero = tl.zeros([ROWS, COLUMNS // 4], tl.uint32)
    c0, c1 = tokens.to(tl.uint32)[:, None] + zero, fours.to(tl.uint32)[None, :] + zero
    r0, r1, r2, r3 = tl.philox(seed, c0, c1, zero, zero, ROUNDS)
    numbers = tl.join(tl.join(r0, r2), tl.join(r1, r3)).reshape([ROWS, COLUMNS])
    return tl.uint_to_uniform_float(numbers) >= DROPOUT
