"""The gate in rank space: g = α softmax(scores) + β and the core that follows from it, in registers.

Every form is a grid of pairs (i, j), flattened to i * BJ + j where BI and BJ are its sizes padded to powers of two:

    identity, diagonal   i a rank, one j               rank i             expert i             output i
    block                i an expert, j its ranks      rank i * NJ + j    expert i             output i * NJ + j
    matrix               i a row of A, j one of Bᵀ     rank i             expert i * NJ + j    output j

A tile of tokens holds h, g and dO of every pair, [tokens, BI * BJ], repeated where several pairs share one. So the core
is an elementwise product and, in one of the two directions, a sum over i or over j.
"""
# ruff: noqa: ANN001, ANN201
# pyright: reportArgumentType=false, reportCallIssue=false, reportAssignmentType=false, reportGeneralTypeIssues=false

from typing import NamedTuple

import triton
import triton.language as tl

from moe_peft.kernels.gpu.launch import VARYING
from moe_peft.kernels.reference import Form

MOST_PAIRS = 4096
"""Most pairs that the registers of one program hold."""


class Pairs(NamedTuple):
    """Sizes of the grid of pairs, named as the kernels' constants are."""

    R: int
    E: int
    Q: int
    NI: int
    NJ: int
    BI: int
    BJ: int
    MATRIX: bool

    @property
    def padded(self) -> int:
        """Pairs of the padded grid."""
        return self.BI * self.BJ

    @property
    def tokens(self) -> int:
        """Tokens of one tile, where a program holds all pairs of them."""
        return min(max(1024 // self.padded, 1), 64)

    @property
    def warps(self) -> int:
        """Warps for such a tile."""
        return min(max(self.padded // 256, 4), 16)


def sizes(form: Form, ranks: int, experts: int) -> tuple[int, int, int, int]:
    """Returns the sizes of the grid of a form, and of the padded one."""
    if form == "matrix":
        i, j = ranks, experts // ranks
    else:
        i, j = (experts, ranks // experts) if form == "block" else (ranks, 1)
    bj = triton.next_power_of_2(j)
    return i, j, max(triton.next_power_of_2(i), 16 // bj), bj


def fits(form: Form, ranks: int, experts: int) -> bool:
    """Returns whether the registers of one program hold all pairs."""
    *_, bi, bj = sizes(form, ranks, experts)
    return bi * bj <= MOST_PAIRS


def pairs(form: Form, ranks: int, experts: int) -> Pairs:
    """Returns the grid of a form.

    Args:
        form: see reference.py.
        ranks: R, rows of A.
        experts: E; 0 for the identity.

    Raises:
        ValueError: for more pairs than one program holds.
    """
    matrix, (i, j, bi, bj) = form == "matrix", sizes(form, ranks, experts)
    if not fits(form, ranks, experts):
        raise ValueError(
            f"a gate of form {form!r} with R={ranks} and E={experts} has {bi * bj} padded pairs of ranks: GPU kernels"
            f" take at most {MOST_PAIRS}; use fewer experts, or kernels: torch"
        )
    return Pairs(ranks, experts, j if matrix else ranks, i, j, bi, bj, matrix)


@triton.jit
def grid_of(pair, NI: tl.constexpr, NJ: tl.constexpr, BJ: tl.constexpr, MATRIX: tl.constexpr):
    """Returns what the pairs are.

    Args:
        pair: [BI * BJ] flat numbers of pairs.
        NI: rows of the grid.
        NJ: columns of the grid.
        BJ: columns of the padded grid.
        MATRIX: which form.

    Returns:
        rank, expert and output of every pair; whether it is there at all, and whether it is the one of the pairs that
        share a rank, an expert, an output that stands for it.
    """
    i, j = pair // BJ, pair % BJ
    valid = (i < NI) & (j < NJ)
    both = i * NJ + j
    if MATRIX:
        return i, both, j, valid, valid & (j == 0), valid, valid & (i == 0)
    else:
        return both, i, both, valid, valid, valid & (j == 0), valid


@triton.jit
def total(values, OVER_I: tl.constexpr, ROWS: tl.constexpr, BI: tl.constexpr, BJ: tl.constexpr):
    """Sums [ROWS, BI * BJ] over i or over j; every pair gets its sum."""
    sums = tl.sum(values.reshape([ROWS, BI, BJ]), 1 if OVER_I else 2, keep_dims=True)
    return tl.broadcast_to(sums, [ROWS, BI, BJ]).reshape([ROWS, BI * BJ])


@triton.jit
def softmax(scores, valid, counted):
    """Returns the softmax over experts; `valid` leaves out padding, `counted` takes each expert once."""
    scores = tl.where(valid, scores, -float("inf"))
    weights = tl.exp(scores - tl.max(scores, 1)[:, None])
    return weights / tl.sum(tl.where(counted, weights, 0.0), 1)[:, None]


@triton.jit
def softmax_backward(p, dp, counted):
    """Returns the gradient of the scores from that of their softmax p."""
    return p * (dp - tl.sum(tl.where(counted, p * dp, 0.0), 1)[:, None])


@triton.jit
def beta_row(token, every):
    """Returns the row of β that a token uses."""
    return token // every


@triton.jit
def weights(p, alpha, beta, token, every, expert, valid, E: tl.constexpr, ACC: tl.constexpr):
    """Returns g = α p + β of every pair.

    Args:
        p: [tokens, pairs] softmax; without `alpha` of no meaning.
        alpha: pointer to α, or None.
        beta: pointer to β, or None.
        token: [tokens] numbers of tokens in the whole batch.
        every: tokens that share a row of β.
        expert: [pairs].
        valid: [tokens, pairs].
        E: number of experts.
        ACC: dtype.
    """
    g = tl.zeros(p.shape, ACC)
    if alpha is not None:
        g += tl.load(alpha).to(ACC) * p
    if beta is not None:
        where = beta_row(token, every).to(tl.int64)[:, None] * E + expert[None, :]
        g += tl.load(beta + where, valid, other=0.0).to(ACC)
    return g


@triton.jit
def core(h, g, MATRIX: tl.constexpr, ROWS: tl.constexpr, BI: tl.constexpr, BJ: tl.constexpr):
    """Returns o of every pair."""
    o = h * g
    if MATRIX:
        o = total(o, True, ROWS, BI, BJ)
    return o


@triton.jit
def core_backward(h, g, do, MATRIX: tl.constexpr, ROWS: tl.constexpr, BI: tl.constexpr, BJ: tl.constexpr):
    """Returns the gradients of h and g of every pair from that of o."""
    dh, dg = do * g, do * h
    if MATRIX:
        dh = total(dh, False, ROWS, BI, BJ)
    else:
        dg = total(dg, False, ROWS, BI, BJ)
    return dh, dg


@triton.jit(do_not_specialize=VARYING)
def gate(
    parts,
    alpha,
    beta,
    z,
    o,
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
    """Adds up the parts of z [splits, count, R + E], into z where that is not None, and applies the gate."""
    WIDTH: tl.constexpr = R + E if SCORES else R
    rank, expert, output, valid, of_rank, of_expert, of_output = grid_of(tl.arange(0, BI * BJ), NI, NJ, BJ, MATRIX)
    token = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    there = (token < count)[:, None] & valid[None, :]
    at = token[:, None] * WIDTH
    h = tl.zeros([BM, BI * BJ], ACC)
    scores = tl.zeros([BM, BI * BJ], ACC)
    for _ in range(splits):
        h += tl.load(parts + at + rank[None, :], there, other=0.0)
        if SCORES:
            scores += tl.load(parts + at + R + expert[None, :], there, other=0.0)
        parts += tl.cast(count, tl.int64) * WIDTH
    if z is not None:
        tl.store(z + at + rank[None, :], h, there & of_rank[None, :])
        if SCORES:
            tl.store(z + at + R + expert[None, :], scores, there & of_expert[None, :])
    if E > 0:
        p = softmax(scores, valid[None, :], of_expert[None, :]) if SCORES else scores
        h = core(h, weights(p, alpha, beta, token, every, expert, there, E, ACC), MATRIX, BM, BI, BJ)
    tl.store(o + token[:, None] * Q + output[None, :], h, there & of_output[None, :])
