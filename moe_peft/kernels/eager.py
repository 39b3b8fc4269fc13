"""The gated low-rank update in plain torch operations, forward and backward by hand: keeps rank space only.

The same steps as the Triton kernels (see `moe_peft.kernels.gpu`), in the order in which `function` takes them:

    forward      z = [A; W_r] xᵀ,   o = C(z) z_A                             shrink_gate, expand_
    backward     do = s Bᵀ dYᵀ,  dBᵀ = s o dY,  dz, dα, dβ from do           backward_y
                 dX += dzᵀ [A; W_r]                                          backward_x
                 d[A; W_r] = dz X                                            backward_w

With g = α p + β, p = softmax(l) and ⟨·⟩ the sum over tokens that share a row of β (arXiv 2404.08985 has no backward; it
follows from the formulas of `reference`):

    diagonal, block    dg_e = Σ_r h_er do_er                dh_er = g_e do_er
    matrix             dG_ij = h_i do_j                     dh_i = Σ_j G_ij do_j
    all                dβ = ⟨dg⟩,  dα = Σ p · dg            dl = α p ∘ (dg - p · dg)

Rank space lies ranks first, tokens last: z [R + E, M], so that softmax and core run along whole vectors of tokens, and
skinny products are up to twice as fast on a CPU. Tokens that share a row of β lie together, M = n * every.

Shapes: x [M, D] with one w [R + E, D] for all tokens, or [B, S, D] with one for each row w [B, R + E, D]; bt likewise
[Q, O] or [B, Q, O]: Bᵀ, whose rows are contiguous. Products run in the dtype of x, the gate in fp32 (fp64 for fp64).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from moe_peft.kernels.reference import Form


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


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Returns left right. One for each row it is taken the other way round: else its rounding depends on how many rows
    there are, and a rank's share of a batch would train otherwise than the whole.
    """
    return torch.matmul(left, right) if left.dim() == 2 else torch.matmul(right.mT, left.mT).mT.contiguous()


def shrink_gate(
    x: Tensor, w: Tensor, plan: Plan, alpha: Tensor | None, beta: Tensor | None, kept: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Returns z [.., R + E, M], o [.., Q, M] in the dtype of x, and the softmax p [.., E, n, every] where there is one.

    Args:
        x: inputs.
        w: [A; W_r].
        plan: what is fixed.
        alpha: [1], or None without scores.
        beta: [M / every, E], or None.
        kept: see `draw`.
    """
    if kept is None:
        z = _product(w, x.mT)
    else:
        z = torch.matmul(w[..., : plan.rank, :], _dropped(x, kept, plan).mT)
        if w.shape[-2] > plan.rank:
            z = torch.cat([z, torch.matmul(w[..., plan.rank :, :], x.mT)], -2)
    if plan.form == "identity":
        return z, z, None
    h, p = _grouped(z[..., : plan.rank, :], plan), None
    if alpha is not None:
        p = torch.softmax(_grouped(z[..., plan.rank :, :], plan), -3, alpha.dtype)
    o = _through_core(h, _weights(p, alpha, beta, z, plan), plan.form)
    return z, o.to(z.dtype).flatten(-2), p


def _grouped(ranks: Tensor, plan: Plan) -> Tensor:
    """Splits tokens into those that share a row of β: [.., E, M] to [.., E, n, every]."""
    return ranks.unflatten(-1, (-1, min(plan.every, ranks.shape[-1])))


def _weights(p: Tensor | None, alpha: Tensor | None, beta: Tensor | None, z: Tensor, plan: Plan) -> Tensor:
    """Returns g = α p + β as [.., E, n, every or 1]."""
    if beta is not None:
        if z.dim() == 3:  # the groups of one row of the batch; of a β that all rows share there is one
            beta = beta.view(-1, max(1, z.shape[-1] // plan.every), beta.shape[-1])
        beta = beta.mT.unsqueeze(-1)
    if p is None or alpha is None:
        assert beta is not None
        return beta
    return p * alpha if beta is None else torch.addcmul(beta, p, alpha)


def _through_core(h: Tensor, g: Tensor, form: Form) -> Tensor:
    """Returns o [.., Q, n, every] of h [.., R, n, every] and g [.., E, n, every]."""
    if form == "diagonal":
        return h * g
    if form == "block":
        return (h.unflatten(-3, (g.shape[-3], -1)) * g.unsqueeze(-3)).flatten(-4, -3)
    return (h.unsqueeze(-3) * g.unflatten(-3, (h.shape[-3], -1))).sum(-4)


def expand_(y: Tensor, o: Tensor, bt: Tensor, scale: float) -> Tensor:
    """Adds scale * oᵀ Bᵀ to y in place, whatever the dtype of y."""
    if y.dtype != bt.dtype:
        return y.add_(torch.matmul(o.mT, bt), alpha=scale)
    add = torch.Tensor.addmm_ if bt.dim() == 2 else torch.Tensor.baddbmm_
    return add(y, o.mT, bt, alpha=scale)


class Gradients(NamedTuple):
    """What `backward_y` returns."""

    dz: Tensor
    """As z, in the dtype of x."""
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
    do, dbt = _product(bt, dy.mT), _product(o, dy) if need_b else None
    if plan.scale != 1:
        wide = torch.promote_types(do.dtype, torch.float32)
        do, dbt = do.mul_(plan.scale), None if dbt is None else dbt.to(wide).mul_(plan.scale)
    if plan.form == "identity":
        return Gradients(do, dbt, None, None)
    h, g = _grouped(z[..., : plan.rank, :], plan), _weights(p, alpha, beta, z, plan)
    dg, dh = _back_through_core(_grouped(do.to(g.dtype), plan), h, g, plan.form)
    dz, dbeta = torch.empty_like(z), None
    dz[..., : plan.rank, :] = dh.flatten(-2)
    if beta is not None:
        dbeta = dg.sum(-1).mT.reshape(-1, beta.shape[-1])
        dbeta = dbeta if len(dbeta) == len(beta) else dbeta.sum(0, keepdim=True)
    if p is None or alpha is None:
        return Gradients(dz, dbt, None, dbeta)
    dl = torch.ops.aten._softmax_backward_data(dg, p, -3, p.dtype)
    torch.mul(dl.flatten(-2), alpha, out=dz[..., plan.rank :, :])
    return Gradients(dz, dbt, torch.dot(p.flatten(), dg.flatten()).view(1), dbeta)


def _back_through_core(do: Tensor, h: Tensor, g: Tensor, form: Form) -> tuple[Tensor, Tensor]:
    """Returns dg [.., E, n, every] and dh [.., R, n, every] from do [.., Q, n, every]."""
    if form == "diagonal":
        return h * do, g * do
    if form == "block":
        experts = (g.shape[-3], -1)
        do, h = do.unflatten(-3, experts), h.unflatten(-3, experts)
        return (h * do).sum(-3), (g.unsqueeze(-3) * do).flatten(-4, -3)
    do = do.unsqueeze(-4)
    return (h.unsqueeze(-3) * do).flatten(-4, -3), (g.unflatten(-3, (h.shape[-3], -1)) * do).sum(-3)


def backward_x(dz: Tensor, w: Tensor, dx: Tensor | None, plan: Plan, kept: Tensor | None) -> Tensor:
    """Returns dX: dzᵀ [A; W_r], added to `dx` in place where other branches have given x a gradient already.

    Args:
        dz: as z.
        w: [A; W_r].
        dx: [.., D], or None.
        plan: what is fixed.
        kept: see `draw`.
    """
    if kept is not None:
        own = _dropped(torch.matmul(dz[..., : plan.rank, :].mT, w[..., : plan.rank, :]), kept, plan)
        dx = own if dx is None else dx.add_(own)
        dz, w = dz[..., plan.rank :, :], w[..., plan.rank :, :]
    if dx is None:
        return torch.matmul(dz.mT, w)
    return expand_(dx, dz, w, 1.0) if w.shape[-2] else dx


def backward_w(dz: Tensor, x: Tensor, plan: Plan, kept: Tensor | None) -> Tensor:
    """Returns d[A; W_r]: dz x.

    Args:
        dz: as z.
        x: inputs.
        plan: what is fixed.
        kept: see `draw`.
    """
    if kept is None:
        return torch.matmul(dz, x)
    da = torch.matmul(dz[..., : plan.rank, :], _dropped(x, kept, plan))
    return torch.cat([da, torch.matmul(dz[..., plan.rank :, :], x)], -2)
