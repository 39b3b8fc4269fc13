"""Backward to the input and to [A; W_r] with dropout: dX += (dz_A A) ∘ mask + dz_r W_r, d[A; W_r] = dzᵀ (x ∘ mask).

Both draw the mask again from its seed, so that neither the mask nor the dropped x is ever written. Without dropout they
are torch's products, which move the same bytes.
"""
# ruff: noqa: ANN001, ANN201
# pyright: reportArgumentType=false, reportCallIssue=false, reportAssignmentType=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl
from torch import Tensor

from moe_peft.kernels import eager
from moe_peft.kernels.eager import Plan
from moe_peft.kernels.gpu.dropout import kept
from moe_peft.kernels.gpu.launch import VARYING, WARPS, accumulator, groups, launch, load, tile_of, tuned, types


@triton.jit(do_not_specialize=VARYING)
def add_dx(
    dz,
    w,
    seed,
    given,
    dx,
    tokens,
    D,
    stride,
    DROPOUT: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    BM: tl.constexpr,
    BD: tl.constexpr,
    BP: tl.constexpr,
    ACC: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of dX: what is given, or zero, plus dz [A; W_r] with the mask on A's part."""
    group, start = tl.program_id(2).to(tl.int64), tl.program_id(0) * BM
    begin = tl.program_id(1) * BD
    row, column = tl.arange(0, BM), begin + tl.arange(0, BD)
    inside = start + row < tokens
    first = group * tokens + start
    w += group * stride
    masked = tl.zeros([BM, BD], ACC)
    plain = tl.zeros([BM, BD], ACC)
    for at in range(0, C, BP):
        rank = at + tl.arange(0, BP)
        tile = load(dz + first * C, row, inside, rank, C, OPERAND)
        rows = load(w, rank, rank < C, column, D, OPERAND)
        of_a = tl.where((rank < R)[None, :], tile, 0.0)
        masked = tl.dot(of_a, rows, masked, input_precision=PRECISION, out_dtype=ACC)
        if C > R:
            of_scores = tl.where((rank < R)[None, :], 0.0, tile)
            plain = tl.dot(of_scores, rows, plain, input_precision=PRECISION, out_dtype=ACC)
    keep = kept(tl.load(seed), first + row, begin, BM, BD, DROPOUT)
    sums = plain + tl.where(keep, masked * (1 / (1 - DROPOUT)), 0.0)
    at_x = first * D + row[:, None] * D + column[None, :]
    there = inside[:, None] & (column < D)[None, :]
    if given is not None:
        sums += load(given + first * D, row, inside, column, D, ACC)
    tl.store(dx + at_x, sums, there)


def _stage(meta: dict) -> int:
    return meta["BM"] * (meta["BD"] + meta["BP"])


@tuned(_stage, key=["D", "R", "C"])
@triton.jit(do_not_specialize=VARYING)
def read_x(
    x,
    dz,
    seed,
    dw,
    tokens,
    D,
    each,
    DROPOUT: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    BM: tl.constexpr,
    BD: tl.constexpr,
    BP: tl.constexpr,
    ACC: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """For one tile of columns and tokens [chunk * each, (chunk + 1) * each): their part of d[A; W_r]."""
    TILES: tl.constexpr = (C + BP - 1) // BP
    chunk, group = tl.program_id(1), tl.program_id(2).to(tl.int64)
    begin = tl.program_id(0) // TILES * BD
    row, column = tl.arange(0, BM), begin + tl.arange(0, BD)
    rank = tl.program_id(0) % TILES * BP + tl.arange(0, BP)
    number = tl.load(seed)
    sums = tl.zeros([BP, BD], ACC)
    for start in range(chunk * each, tl.minimum((chunk + 1) * each, tokens), BM):
        first = group * tokens + start
        inside = start + row < tokens
        tile = load(x + first * D, row, inside, column, D, OPERAND)
        dropped = tl.where(kept(number, first + row, begin, BM, BD, DROPOUT), tile, 0.0)
        back = load(dz + first * C, row, inside, rank, C, OPERAND)
        of_a = tl.where((rank < R)[None, :], back, 0.0)
        sums = tl.dot(tl.trans(of_a), dropped, sums, input_precision=PRECISION, out_dtype=ACC)
        if C > R:
            of_scores = tl.where((rank < R)[None, :], 0.0, back)
            sums = tl.dot(tl.trans(of_scores), tile, sums, input_precision=PRECISION, out_dtype=ACC)
    sums = tl.where((rank < R)[:, None], sums * (1 / (1 - DROPOUT)), sums)
    dw += (group * tl.num_programs(1) + chunk) * C * D
    tl.store(dw + rank[:, None] * D + column[None, :], sums, (rank < C)[:, None] & (column < D)[None, :])


def backward_x(dz: Tensor, w: Tensor, dx: Tensor | None, plan: Plan, kept: Tensor | None) -> Tensor:
    """Returns dX: dz [A; W_r], with dropout on A's part, added to `dx` in place where that is given.

    Args:
        dz: [M, R + E], or [B, S, R + E] where rows have their own factors.
        w: [A; W_r] as [R + E, D], or [B, R + E, D] where rows have their own factors.
        dx: [.., D], or None.
        plan: what is fixed.
        kept: seed of the dropout, see `dropout.draw`; None without.
    """
    if kept is None:
        return eager.backward_x(dz.mT, w, dx, plan, None)
    w = w.contiguous()
    group, columns, depth = groups(dz, w), w.shape[-2], w.shape[-1]
    assert dx is None or dx.is_contiguous()
    found = dz.new_empty(*dz.shape[:-1], depth) if dx is None else dx
    bm, bd = 32, 256 // dz.element_size()
    grid = (triton.cdiv(group.tokens, bm), triton.cdiv(depth, bd), group.count)
    launch(
        add_dx,
        grid,
        dz,
        w,
        kept,
        dx,
        found,
        group.tokens,
        depth,
        group.stride,
        DROPOUT=plan.dropout,
        R=plan.rank,
        C=columns,
        BM=bm,
        BD=bd,
        BP=tile_of(columns),
        num_warps=WARPS,
        **types(dz),
    )
    return found


def backward_w(dz: Tensor, x: Tensor, plan: Plan, kept: Tensor | None) -> Tensor:
    """Returns d[A; W_r]: dzᵀ x with dropout on A's part, in fp32 where there is dropout.

    Args:
        dz: [M, R + E], or [B, S, R + E] where rows have their own factors.
        x: inputs.
        plan: what is fixed.
        kept: seed of the dropout, see `dropout.draw`; None without.
    """
    if kept is None:
        return eager.backward_w(dz.mT, x, plan, None)
    x = x.contiguous()
    own = x.dim() == 3
    group = groups(x, x if own else x[:0])
    columns, depth = dz.shape[-1], x.shape[-1]
    bm, bd, bp = 32, 256 // x.element_size(), tile_of(columns)
    tiles = triton.cdiv(depth, bd) * triton.cdiv(columns, bp)
    chunks, each = group.chunks(bm, tiles)
    dw = x.new_empty(group.count, chunks, columns, depth, dtype=accumulator(x))
    launch(
        read_x,
        (tiles, chunks, group.count),
        x,
        dz,
        kept,
        dw,
        group.tokens,
        depth,
        each,
        DROPOUT=plan.dropout,
        R=plan.rank,
        C=columns,
        BM=bm,
        BD=bd,
        BP=bp,
        **types(x),
    )
    dw = dw.sum(1)
    return dw if own else dw.squeeze(0)
