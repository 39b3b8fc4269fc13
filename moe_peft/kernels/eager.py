"""The gated low-rank update in plain torch operations, forward and backward by hand: keeps rank space only.

The same three steps as the Triton kernels (see `moe_peft.kernels.gpu`), in the order in which `function` takes them:

    forward      z = x [A; W_r]ᵀ,   o = C(z) z_A                             shrink_gate
    backward     do = s dY B,  dB = s dYᵀ o,  dz, dα, dβ from do             backward_y
                 dX += dz [A; W_r]                                           backward_x
                 d[A; W_r] = dzᵀ X                                           backward_w

With g = α p + β, p = softmax(l) and ⟨·⟩ the sum over tokens that share a row of β (arXiv 2404.08985 has no backward; it
follows from the formulas of `reference`):

    diagonal, block    dg_e = Σ_r h_er do_er                dh_er = g_e do_er
    matrix             dG_ij = h_i do_j                     dh_i = Σ_j G_ij do_j
    all                dβ = ⟨dg⟩,  dα = Σ p · dg            dl = α p ∘ (dg - p · dg)

Shapes: x [M, D] with one w [R + E, D] for all tokens, or [B, S, D] with one for each row w [B, R + E, D]; bt likewise
[Q, O] or [B, Q, O]: Bᵀ, whose rows are contiguous. Products run in the dtype of x, the gate in fp32 (fp64 for fp64).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from moe_peft.kernels.reference import Form, apply_gate, gate_weights


class Plan(NamedTuple):
    """What is fixed about an update."""

    form: Form
    rank: int
    """R; the rows of w beyond it score the experts."""
    every: int
    """Tokens, in a row, that share one row of β [M / every, E]."""
    scale: float
    dropout: float = 0.0
    """Probability that an element of x is dropped before A (never before W_r)."""


def draw(x: Tensor, plan: Plan) -> Tensor | None:
    """Returns which elements of x dropout keeps, as booleans; None without dropout."""
    return torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - plan.dropout) if plan.dropout else None


def _dropped(x: Tensor, kept: Tensor, plan: Plan) -> Tensor:
    return (x * kept).mul_(1 / (1 - plan.dropout))


def _grouped(tensor: Tensor, every: int) -> Tensor:
    """Puts tokens that share a row of β together: [..., E] to [M / every, every, E]."""
    return tensor.reshape(-1, every, tensor.shape[-1])


def shrink_gate(
    x: Tensor, w: Tensor, plan: Plan, alpha: Tensor | None, beta: Tensor | None, kept: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Returns z [.., R + E], o [.., Q] in the dtype of x, and the softmax p [M / every, every, E] where there is one.

    Args:
        x: inputs.
        w: [A; W_r].
        plan: what is fixed.
        alpha: [1], or None without scores.
        beta: [M / every, E], or None.
        kept: see `draw`.
    """
    if kept is None:
        z = torch.matmul(x, w.mT)
    else:
        z = torch.matmul(_dropped(x, kept, plan), w[..., : plan.rank, :].mT)
        if w.shape[-2] > plan.rank:
            z = torch.cat([z, torch.matmul(x, w[..., plan.rank :, :].mT)], -1)
    if plan.form == "identity":
        return z, z, None
    p, g = _gate(z, plan, alpha, beta)
    h = _grouped(z[..., : plan.rank], plan.every)
    return z, apply_gate(h, g, plan.form).to(z.dtype).view(*z.shape[:-1], -1), p


def _gate(z: Tensor, plan: Plan, alpha: Tensor | None, beta: Tensor | None) -> tuple[Tensor | None, Tensor]:
    """Returns p [M / every, every, E] (None without scores) and g, likewise or [M / every, 1, E]."""
    beta = None if beta is None else beta.unsqueeze(1)
    if alpha is None:
        return None, gate_weights(None, None, beta)
    p = torch.softmax(_grouped(z[..., plan.rank :], plan.every), -1, alpha.dtype)
    return p, p * alpha if beta is None else torch.addcmul(beta, p, alpha)


def expand_(y: Tensor, o: Tensor, bt: Tensor, scale: float) -> Tensor:
    """Adds scale * o B^T to y in place, whatever the dtype of y."""
    if y.dtype != bt.dtype:
        return y.add_(torch.matmul(o, bt), alpha=scale)
    add = torch.Tensor.addmm_ if bt.dim() == 2 else torch.Tensor.baddbmm_
    return add(y, o, bt, alpha=scale)


class Gradients(NamedTuple):
    """What `backward_y` returns."""

    dz: Tensor
    """[.., R + E] in the dtype of x."""
    dbt: Tensor | None
    """[Q, O] or [B, Q, O]."""
    dalpha: Tensor | None
    dbeta: Tensor | None


def backward_y(
    dy: Tensor,
    bt: Tensor,
    o: Tensor,
    z: Tensor,
    p: Tensor | None,
    plan: Plan,
    alpha: Tensor | None,
    beta: Tensor | None,
    need_b: bool,
) -> Gradients:
    """Goes back from the output to rank space (see the module's docstring)."""
    do = torch.matmul(dy, bt.mT)
    dbt = torch.matmul(o.mT, dy) if need_b else None
    if plan.scale != 1:
        do, dbt = do.mul_(plan.scale), None if dbt is None else dbt.mul_(plan.scale)
    if plan.form == "identity":
        return Gradients(do, dbt, None, None)
    dtype = (beta if alpha is None else alpha).dtype  # type: ignore[union-attr]
    do, h = _grouped(do.to(dtype), plan.every), _grouped(z[..., : plan.rank], plan.every)
    g = _gated_again(p, alpha, beta)
    dg, dh = _through_core(do, h, g, plan.form)
    dz = torch.empty_like(z)
    dz[..., : plan.rank] = dh.view(*z.shape[:-1], plan.rank)
    dbeta = dg.sum(1) if beta is not None else None
    if p is None or alpha is None:
        return Gradients(dz, dbt, None, dbeta)
    dl = torch.ops.aten._softmax_backward_data(dg, p, -1, p.dtype)
    torch.mul(dl.view(*z.shape[:-1], -1), alpha, out=dz[..., plan.rank :])
    return Gradients(dz, dbt, torch.dot(p.flatten(), dg.flatten()).view(1), dbeta)


def _gated_again(p: Tensor | None, alpha: Tensor | None, beta: Tensor | None) -> Tensor:
    """Returns g once more: one operation, where keeping it would double what is saved."""
    if p is None or alpha is None:
        assert beta is not None
        return beta.unsqueeze(1)
    return p * alpha if beta is None else torch.addcmul(beta.unsqueeze(1), p, alpha)


def _through_core(do: Tensor, h: Tensor, g: Tensor, form: Form) -> tuple[Tensor, Tensor]:
    """Returns dg [N, every, E] and dh [N, every, R] from do [N, every, Q]."""
    if form == "diagonal":
        return h * do, g * do
    if form == "block":
        experts = (g.shape[-1], -1)
        do, h = do.unflatten(-1, experts), h.unflatten(-1, experts)
        return (h * do).sum(-1), (g.unsqueeze(-1) * do).flatten(-2)
    matrix = g.unflatten(-1, (h.shape[-1], -1))
    dg = (h.unsqueeze(-1) * do.unsqueeze(-2)).flatten(-2)
    return dg, torch.matmul(matrix, do.unsqueeze(-1)).squeeze(-1)


def backward_x(dz: Tensor, w: Tensor, dx: Tensor | None, plan: Plan, kept: Tensor | None) -> Tensor:
    """Returns dX: dz [A; W_r], added to `dx` in place where other branches have given x a gradient already.

    Args:
        dz: [.., R + E].
        w: [A; W_r].
        dx: [.., D], or None.
        plan: what is fixed.
        kept: see `draw`.
    """
    if kept is not None:
        own = _dropped(torch.matmul(dz[..., : plan.rank], w[..., : plan.rank, :]), kept, plan)
        dx = own if dx is None else dx.add_(own)
        dz, w = dz[..., plan.rank :], w[..., plan.rank :, :]
    if dx is None:
        return torch.matmul(dz, w)
    return expand_(dx, dz, w, 1.0) if w.shape[-2] else dx


def backward_w(dz: Tensor, x: Tensor, plan: Plan, kept: Tensor | None) -> Tensor:
    """Returns d[A; W_r]: dzᵀ x.

    Args:
        dz: [.., R + E].
        x: inputs.
        plan: what is fixed.
        kept: see `draw`.
    """
    if kept is None:
        return torch.matmul(dz.mT, x)
    da = torch.matmul(dz[..., : plan.rank].mT, _dropped(x, kept, plan))
    return torch.cat([da, torch.matmul(dz[..., plan.rank :].mT, x)], -2)
