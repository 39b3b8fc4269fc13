"""Backward from the output: do = s dY B, dB = s dYᵀ o and the gate's backward, reading dY once for every 32 ranks.

A program of the first kernel takes one tile of outputs and a chunk of tokens: it adds up dB of them in registers and
leaves the tile's part of do. The second, in rank space, adds up the parts of do and goes back through the gate. The
parts of do take Q / 128 of the bytes of dY.
"""
# ruff: noqa: ANN001, ANN201
# pyright: reportArgumentType=false, reportCallIssue=false, reportAssignmentType=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl
from torch import Tensor

from moe_peft.kernels.eager import Gradients, Plan
from moe_peft.kernels.gpu.gates import core_backward, grid_of, pairs, softmax, softmax_backward, weights
from moe_peft.kernels.gpu.launch import VARYING, accumulator, groups, launch, load, tile_of, tuned, types


def _stage(meta: dict) -> int:
    return meta["BM"] * (meta["BO"] + meta["BQ"])


@tuned(_stage, key=["WIDTH", "Q", "NEED_B"])
@triton.jit(do_not_specialize=VARYING)
def read_dy(
    dy,
    bt,
    o,
    parts,
    dbt,
    tokens,
    WIDTH,
    each,
    stride,
    SCALE: tl.constexpr,
    NEED_B: tl.constexpr,
    Q: tl.constexpr,
    BM: tl.constexpr,
    BO: tl.constexpr,
    BQ: tl.constexpr,
    ACC: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """For one tile of outputs and tokens [chunk * each, (chunk + 1) * each): its parts of do and of dBᵀ."""
    QS: tl.constexpr = (Q + BQ - 1) // BQ
    tile, chunk = tl.program_id(0) // QS, tl.program_id(1)
    group = tl.program_id(2).to(tl.int64)
    column = tile * BO + tl.arange(0, BO)
    q = tl.program_id(0) % QS * BQ + tl.arange(0, BQ)
    row = tl.arange(0, BM)
    bt += group * stride
    factor = load(bt, q, q < Q, column, WIDTH, OPERAND)
    parts += tile * tl.num_programs(2).to(tl.int64) * tokens * Q

    sums = tl.zeros([BQ, BO], ACC)
    for start in range(chunk * each, tl.minimum((chunk + 1) * each, tokens), BM):
        first = group * tokens + start
        inside = start + row < tokens
        tile_dy = load(dy + first * WIDTH, row, inside, column, WIDTH, OPERAND)
        do = tl.dot(tile_dy, tl.trans(factor), input_precision=PRECISION, out_dtype=ACC)
        at = first * Q + row[:, None] * Q + q[None, :]
        tl.store(parts + at, do * SCALE, inside[:, None] & (q < Q)[None, :])
        if NEED_B:
            tile_o = load(o + first * Q, row, inside, q, Q, OPERAND)
            sums = tl.dot(tl.trans(tile_o), tile_dy, sums, input_precision=PRECISION, out_dtype=ACC)
    if NEED_B:
        dbt += (group * tl.num_programs(1) + chunk) * Q * WIDTH
        there = (q < Q)[:, None] & (column < WIDTH)[None, :]
        tl.store(dbt + q[:, None] * WIDTH + column[None, :], sums * SCALE, there)


@triton.jit(do_not_specialize=VARYING)
def gate_backward(
    parts,
    z,
    alpha,
    beta,
    dz,
    dg,
    dalpha,
    count,
    splits,
    every,
    SCORES: tl.constexpr,
    R: tl.constexpr,
    E: tl.constexpr,
    Q: tl.constexpr,
    NI: tl.constexpr,
    NJ: tl.constexpr,
    BI: tl.constexpr,
    BJ: tl.constexpr,
    MATRIX: tl.constexpr,
    BM: tl.constexpr,
    ACC: tl.constexpr,
):
    """Adds up the parts of do [splits, count, Q]; dz, dg of every token, and each program's part of dα."""
    WIDTH: tl.constexpr = R + E if SCORES else R
    rank, expert, output, valid, of_rank, of_expert, of_output = grid_of(tl.arange(0, BI * BJ), NI, NJ, BJ, MATRIX)
    token = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    there = (token < count)[:, None] & valid[None, :]
    at = token[:, None] * WIDTH
    do = tl.zeros([BM, BI * BJ], ACC)
    for _ in range(splits):
        do += tl.load(parts + token[:, None] * Q + output[None, :], there, other=0.0)
        parts += tl.cast(count, tl.int64) * Q
    dh = do
    if E > 0:
        h = tl.load(z + at + rank[None, :], there, other=0.0).to(ACC)
        p = tl.zeros([BM, BI * BJ], ACC)
        if SCORES:
            scores = tl.load(z + at + R + expert[None, :], there, other=0.0).to(ACC)
            p = softmax(scores, valid[None, :], of_expert[None, :])
        g = weights(p, alpha, beta, token, every, expert, there, E, ACC)
        dh, dweights = core_backward(h, g, do, MATRIX, BM, BI, BJ)
        if dg is not None:
            tl.store(dg + token[:, None] * E + expert[None, :], dweights, there & of_expert[None, :])
        if SCORES:
            counted = there & of_expert[None, :]
            tl.store(dalpha + tl.program_id(0), tl.sum(tl.sum(tl.where(counted, p * dweights, 0.0), 1), 0))
            dscores = softmax_backward(p, tl.load(alpha).to(ACC) * dweights, of_expert[None, :])
            tl.store(dz + at + R + expert[None, :], dscores, counted)
    tl.store(dz + at + rank[None, :], dh, there & of_rank[None, :])


def backward_y(
    dy: Tensor,
    bt: Tensor,
    o: Tensor,
    z: Tensor,
    p: None,
    plan: Plan,
    alpha: Tensor | None,
    beta: Tensor | None,
    need_b: bool,
) -> Gradients:
    """Goes back from the output to rank space; dBᵀ comes in fp32.

    Args:
        dy: [M, O], or [B, S, O] where rows have their own factors.
        bt: Bᵀ [Q, O] or [B, Q, O].
        o: what `shrink_gate` returned, in the dtype of dy.
        z: likewise.
        p: likewise.
        plan: what is fixed.
        alpha: [1], or None without scores.
        beta: [M / every, E], or None.
        need_b: whether dBᵀ is wanted.
    """
    dy, bt = dy.contiguous(), bt.contiguous()
    group, width, ranks, outputs = groups(dy, bt), dy.shape[-1], plan.rank, bt.shape[-2]
    scores = alpha is not None
    experts = z.shape[-1] - ranks if scores else 0 if beta is None else beta.shape[-1]
    sizes = pairs(plan.form, ranks, experts)
    bm, bo, bq = 32 if dy.element_size() == 2 else 16, 512 // dy.element_size(), tile_of(outputs)
    tiles, qs = triton.cdiv(width, bo), triton.cdiv(outputs, bq)
    chunks, each = group.chunks(bm, tiles * qs)
    count, wide = group.count * group.tokens, accumulator(dy)
    parts = dy.new_empty(tiles, count, outputs, dtype=wide)
    dbt = dy.new_empty(group.count, chunks, outputs, width, dtype=wide) if need_b else None
    launch(
        read_dy,
        (tiles * qs, chunks, group.count),
        dy,
        bt,
        o,
        parts,
        dbt,
        group.tokens,
        width,
        each,
        group.stride,
        SCALE=plan.scale,
        NEED_B=need_b,
        Q=outputs,
        BM=bm,
        BO=bo,
        BQ=bq,
        **types(dy),
    )
    dz = dy.new_empty(*z.shape)
    programs = triton.cdiv(count, sizes.tokens)
    dg = None if beta is None else dy.new_empty(count, experts, dtype=wide)
    dalpha = dy.new_empty(programs, dtype=wide) if scores else None
    launch(
        gate_backward,
        (programs,),
        parts,
        z,
        alpha,
        None if beta is None else beta.contiguous(),
        dz,
        dg,
        dalpha,
        count,
        tiles,
        plan.every,
        SCORES=scores,
        BM=sizes.tokens,
        ACC=types(dy)["ACC"],
        num_warps=sizes.warps,
        **sizes._asdict(),
    )
    if dbt is not None:
        dbt = dbt.sum(1).view_as(bt)
    dbeta = None if dg is None or beta is None else dg.view(len(beta), plan.every, experts).sum(1)
    return Gradients(dz, dbt, None if dalpha is None else dalpha.sum().view(1), dbeta)
