"""Forward: z = x [A; W_r]ᵀ and o = C(z) z_A, reading x once for every 32 pairs of ranks.

With enough tokens and no more than 32 pairs, one kernel does both: it multiplies x by the rows of A and of W_r once for
every pair, so that the gate is elementwise in its registers. Otherwise the first kernel leaves z, in parts of D where
there are too few tokens to keep a GPU busy, and a second one, in rank space, adds the parts up and applies the gate.
"""
# ruff: noqa: ANN001, ANN201
# pyright: reportArgumentType=false, reportCallIssue=false, reportAssignmentType=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl
from torch import Tensor

from moe_peft.kernels.eager import Plan
from moe_peft.kernels.gpu.dropout import kept
from moe_peft.kernels.gpu.gates import Pairs, core, gate, grid_of, pairs, softmax, weights
from moe_peft.kernels.gpu.launch import (
    PROGRAMS,
    TILE,
    VARYING,
    accumulator,
    groups,
    launch,
    load,
    tile_of,
    tuned,
    types,
)


def _stage(meta: dict) -> int:
    rows = 2 if meta["FUSED"] and meta["SCORES"] else 1
    return (meta["BM"] + rows * meta["BP"]) * meta["BK"]


@tuned(_stage, key=["D", "DROPOUT", "SCORES", "FUSED", "R", "E", "NI", "NJ", "MATRIX", "BM"])
@triton.jit(do_not_specialize=VARYING)
def shrink(
    x,
    w,
    alpha,
    beta,
    seed,
    z,
    o,
    tokens,
    D,
    depth,
    every,
    stride,
    DROPOUT: tl.constexpr,
    SCORES: tl.constexpr,
    FUSED: tl.constexpr,
    R: tl.constexpr,
    E: tl.constexpr,
    Q: tl.constexpr,
    NI: tl.constexpr,
    NJ: tl.constexpr,
    BI: tl.constexpr,
    BJ: tl.constexpr,
    MATRIX: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    BP: tl.constexpr,
    ACC: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of tokens times one tile of rows of w, over columns [split * depth, (split + 1) * depth).

    Fused, a tile of rows is all pairs of the gate; otherwise it is BP rows of w, whose products go to z[split], or to o
    where z is None.
    """
    WIDTH: tl.constexpr = R + E if SCORES else R
    TILES: tl.constexpr = 1 if FUSED else (WIDTH + BP - 1) // BP
    split, group = tl.program_id(1), tl.program_id(2).to(tl.int64)
    start = tl.program_id(0) // TILES * BM
    row = tl.arange(0, BM)
    inside = start + row < tokens
    first = group * tokens + start
    token = first + row
    x += first * D
    w += group * stride
    pair = tl.program_id(0) % TILES * BP + tl.arange(0, BP)
    if FUSED:
        rank, expert, output, valid, of_rank, of_expert, of_output = grid_of(pair, NI, NJ, BJ, MATRIX)
    else:
        rank, valid = pair, pair < WIDTH

    h = tl.zeros([BM, BP], ACC)
    scores = tl.zeros([BM, BP], ACC)
    number = tl.load(seed) if DROPOUT > 0 else 0
    for begin in range(split * depth, tl.minimum((split + 1) * depth, D), BK):
        column = begin + tl.arange(0, BK)
        tile = load(x, row, inside, column, D, OPERAND)
        rows = load(w, rank, valid, column, D, OPERAND)
        if DROPOUT > 0:
            dropped = tl.where(kept(number, token, begin, BM, BK, DROPOUT), tile, 0.0)
        else:
            dropped = tile
        if DROPOUT > 0 and SCORES and not FUSED:
            of_a = (rank < R)[:, None]
            h = tl.dot(dropped, tl.trans(tl.where(of_a, rows, 0.0)), h, input_precision=PRECISION, out_dtype=ACC)
            h = tl.dot(tile, tl.trans(tl.where(of_a, 0.0, rows)), h, input_precision=PRECISION, out_dtype=ACC)
        else:
            h = tl.dot(dropped, tl.trans(rows), h, input_precision=PRECISION, out_dtype=ACC)
        if FUSED and SCORES:
            rows = load(w, R + expert, valid, column, D, OPERAND)
            scores = tl.dot(tile, tl.trans(rows), scores, input_precision=PRECISION, out_dtype=ACC)

    if DROPOUT > 0:
        h = tl.where((rank < R)[None, :], h * (1 / (1 - DROPOUT)), h)
    there = inside[:, None] & valid[None, :]
    if FUSED:
        z += first * WIDTH + row[:, None] * WIDTH
        o += first * Q + row[:, None] * Q
        tl.store(z + rank[None, :], h, there & of_rank[None, :])
        p = scores
        if SCORES:
            tl.store(z + R + expert[None, :], scores, there & of_expert[None, :])
            p = softmax(scores, valid[None, :], of_expert[None, :])
        g = weights(p, alpha, beta, token, every, expert, there, E, ACC)
        tl.store(o + output[None, :], core(h, g, MATRIX, BM, BI, BJ), there & of_output[None, :])
    else:
        if z is None:
            tl.store(o + first * WIDTH + row[:, None] * WIDTH + pair[None, :], h, there)
        else:
            part = split * tl.num_programs(2).to(tl.int64) * tokens + first
            tl.store(z + part * WIDTH + row[:, None] * WIDTH + pair[None, :], h, there)


def _splits(programs: int, steps: int) -> int:
    """Returns into how many parts a sum of `steps` tiles is split, four of them at least in each."""
    return max(1, min(PROGRAMS // max(1, programs), steps // 4))


def shrink_gate(
    x: Tensor,
    w: Tensor,
    plan: Plan,
    alpha: Tensor | None,
    beta: Tensor | None,
    kept: Tensor | None,
) -> tuple[Tensor, Tensor, None]:
    """Returns z [.., R + E] in fp32 and o [.., Q] in the dtype of x, for the identity o twice; no p.

    Args:
        x: inputs [M, D], or [B, S, D] where rows have their own factors.
        w: [A; W_r] as [R + E, D], or [B, R + E, D] where rows have their own factors.
        plan: what is fixed.
        alpha: [1], or None without scores.
        beta: [M / every, E], or None.
        kept: seed of the dropout, see `dropout.draw`.
    """
    x, w = x.contiguous(), w.contiguous()
    group, ranks, depth = groups(x, w), plan.rank, x.shape[-1]
    scores = w.shape[-2] > ranks
    experts = w.shape[-2] - ranks if scores else 0 if beta is None else beta.shape[-1]
    sizes: Pairs = pairs(plan.form, ranks, experts)
    identity = plan.form == "identity"
    beta = None if beta is None else beta.contiguous()

    low, aligned = x.element_size() == 2, depth % 8 == 0
    bm = 16 if group.tokens <= 16 else 64 if low else 32
    if low:
        bk = 32 if not aligned else 64 if scores or plan.dropout else 128
    else:
        bk = 16 if plan.dropout else 32
    rows = triton.cdiv(group.tokens, bm)
    splits = _splits(rows * group.count, triton.cdiv(depth, bk))
    fused = not identity and splits == 1 and sizes.padded <= TILE
    bp = sizes.padded if fused else tile_of(w.shape[-2])
    tiles = 1 if fused else triton.cdiv(w.shape[-2], bp)

    count = group.count * group.tokens
    lead, wide = x.shape[:-1], accumulator(x)
    o = x.new_empty(*lead, sizes.Q)
    z = None if identity else x.new_empty(*lead, w.shape[-2], dtype=wide)
    parts = z if splits == 1 else x.new_empty(splits, count, w.shape[-2], dtype=wide)
    each = triton.cdiv(triton.cdiv(depth, bk), splits) * bk
    constants = sizes._asdict() | {"SCORES": scores}
    launch(
        shrink,
        (rows * tiles, splits, group.count),
        x,
        w,
        alpha,
        beta,
        kept,
        parts,
        o,
        group.tokens,
        depth,
        each,
        plan.every,
        group.stride,
        DROPOUT=plan.dropout,
        FUSED=fused,
        BM=bm,
        BK=bk,
        BP=bp,
        **types(x),
        **constants,
    )
    if not fused and parts is not None:
        programs = (triton.cdiv(count, sizes.tokens),)
        launch(
            gate,
            programs,
            parts,
            alpha,
            beta,
            None if splits == 1 else z,
            o,
            count,
            splits,
            plan.every,
            BM=sizes.tokens,
            ACC=types(x)["ACC"],
            num_warps=sizes.warps,
            **constants,
        )
    return o if z is None else z, o, None
