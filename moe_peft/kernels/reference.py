"""The gated low-rank update, in plain PyTorch: the specification that every faster form is tested against.

    y = y0 + s * B C(x) A x

Shapes: x [..., D], y0 [..., O], A [R, D], B [O, Q]. The core C maps rank space to rank space. In general it has
one of four forms (`apply_core`); tensors are told apart by their number of dimensions against x (their leading
dimensions broadcast over those of x):

    None               identity           Q = R
    [..., R]           diagonal           Q = R, same number of dimensions as x
    [..., Q, R]        full matrix        one dimension more than x
    Tall               m diagonals        Q = m * R, one below the other

Most methods decide only one weight g per expert and token (a `Gate`), from which the core follows by its form:

    g = α softmax(W_r x) + β              [..., E], α a scalar, β any weights of a row or token
    identity    C = I                     Q = R, no g
    diagonal    C = diag(g)               Q = R = E
    block       C = diag(g ⊗ 1)           Q = R = E * r: expert e has ranks e * r .. e * r + r - 1
    matrix      C = Gᵀ                    G = g as [R, Q], E = R * Q: pair (i, j) joins row i of A and column j of B
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

Form = Literal["identity", "diagonal", "block", "matrix"]


class Gate(NamedTuple):
    """What decides the core of every token; the default is the identity (plain LoRA)."""

    form: Form = "identity"
    rows: Tensor | None = None
    """W_r [E, D], scores of x; None leaves g = β."""
    alpha: Tensor | None = None
    """α [1], only with `rows`."""
    beta: Tensor | None = None
    """β [B or 1, S or 1, E], as many dimensions as x; without `rows` required, but for the identity."""


class Tall(NamedTuple):
    """A core of m diagonals, one below the other: block e of its output is diag(weights_e) h."""

    weights: Tensor
    """[..., m, R], or [..., m, 1]: one number for a whole diagonal."""

    def dense(self, rank: int) -> Tensor:
        """Returns the matrix [..., m * R, R], R = `rank`."""
        return torch.diag_embed(self.weights.expand(*self.weights.shape[:-1], rank)).flatten(-3, -2)


Core = Tensor | Tall | None
"""A core as a router's `forward` gives it."""


def apply_core(h: Tensor, core: Core) -> Tensor:
    """Applies a core to rank-space activations.

    Args:
        h: [..., R].
        core: None, [..., R] (diagonal), [..., Q, R] (matrix) or `Tall`; leading dimensions broadcast.

    Returns:
        [..., Q], in the promoted dtype of `h` and `core`.
    """
    if core is None:
        return h
    if isinstance(core, Tall):
        return (h.unsqueeze(-2) * core.weights).flatten(-2)
    if core.dim() == h.dim():
        return h * core
    if core.dim() == h.dim() + 1 > 2 and core.shape[-3] == 1:  # one for all tokens: no [tokens, Q, R]
        dtype = torch.promote_types(h.dtype, core.dtype)
        with torch.autocast(h.device.type, enabled=False):
            return h.to(dtype) @ core.squeeze(-3).mT.to(dtype)
    if core.dim() == h.dim() + 1:
        return (core * h.unsqueeze(-2)).sum(-1)
    raise ValueError(f"core has {core.dim()} dimensions, activations have {h.dim()}: expected as many or one more")


def gate_weights(scores: Tensor | None, alpha: Tensor | None, beta: Tensor | None) -> Tensor:
    """Returns g = α softmax(scores) + β: [..., E].

    Args:
        scores: [..., E], or None.
        alpha: [1], with scores.
        beta: [..., E] broadcasting over the scores, or None.
    """
    if scores is None or alpha is None:
        assert beta is not None
        return beta
    g = alpha * scores.softmax(-1)
    return g if beta is None else g + beta


def apply_gate(h: Tensor, g: Tensor, form: Form) -> Tensor:
    """Applies the core that follows from g.

    Args:
        h: [..., R].
        g: [..., E], leading dimensions broadcast over those of h.
        form: see the module's docstring; not the identity.

    Returns:
        [..., Q].
    """
    if form == "diagonal":
        return h * g
    if form == "block":
        return (h.unflatten(-1, (g.shape[-1], -1)) * g.unsqueeze(-1)).flatten(-2)
    return (h.unsqueeze(-1) * g.unflatten(-1, (h.shape[-1], -1))).sum(-2)


def low_rank_update(y: Tensor, x: Tensor, a: Tensor, b: Tensor, core: Core = None, scale: float = 1.0) -> Tensor:
    """Returns y + scale * B core(A x), out of place, in the dtype of its arguments.

    Args:
        y: [..., O] output of the frozen linear.
        x: [..., D] its input.
        a: [R, D].
        b: [O, Q].
        core: see the module's docstring.
        scale: constant factor s.
    """
    return y + scale * (apply_core(x @ a.mT, core).to(y.dtype) @ b.mT)


def gated_update(y: Tensor, x: Tensor, a: Tensor, b: Tensor, gate: Gate, scale: float = 1.0) -> Tensor:
    """Returns y + scale * B C A x for the core of a gate, out of place, in the dtype of its arguments.

    Args:
        y: [..., O] output of the frozen linear.
        x: [..., D] its input.
        a: [R, D], or [B, R, D]: one for each row of x [B, S, D].
        b: [O, Q], or [B, O, Q].
        gate: what decides the core.
        scale: constant factor s.
    """
    h = x @ a.mT
    if gate.form != "identity":
        scores = None if gate.rows is None else x @ gate.rows.mT
        h = apply_gate(h, gate_weights(scores, gate.alpha, gate.beta), gate.form)
    return y + scale * (h.to(y.dtype) @ b.mT)
