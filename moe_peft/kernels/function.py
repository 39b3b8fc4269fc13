"""The adapted linear as one autograd node: base product, update in place, and a backward that adds dX up in place.

The base is frozen, so no gradient of its weight is ever formed. x is kept by reference; all else that is kept has the
size of rank space or of the factors.
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from moe_peft.kernels.eager import Plan
from moe_peft.kernels.operands import flat, stacked, transposed


def update_(
    y: Tensor,
    x: Tensor,
    w: Tensor,
    bt: Tensor,
    plan: Plan,
    alpha: Tensor | None,
    beta: Tensor | None,
    noise: Tensor | None,
    backend: ModuleType,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Adds the update to y in place; returns what backward needs: z, o, p.

    Args:
        y: [M, O], or [B, S, O] where rows have their own factors; contiguous.
        x: [M, D] or [B, S, D].
        w: see `operands.stacked`.
        bt: see `operands.transposed`.
        plan: what is fixed.
        alpha: [1], or None.
        beta: [M / every, E], or None.
        noise: what the backend's `draw` gave.
        backend: `eager`, or `gpu`: the Triton kernels.
    """
    z, o, p = backend.shrink_gate(x, w, plan, alpha, beta, noise)
    backend.expand_(y, o, bt, plan.scale)
    return z, o, p


class GatedLinear(torch.autograd.Function):
    """y = W0 x + bias + s B C A x, or y0 + s B C A x for a base of any kind (`weight` is None then)."""

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor | None,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        rows: Tensor | None,
        alpha: Tensor | None,
        beta: Tensor | None,
        plan: Plan,
        backend: ModuleType,
    ) -> Tensor:
        """Returns y; see `update_` and `gated.gated_linear`."""
        w, bt = stacked(a, rows, x.dtype), transposed(b, x.dtype)
        if weight is not None:
            y = linear(x, weight, bias)
        else:
            ctx.mark_dirty(y)
        assert y is not None
        inputs = flat(x, w)
        noise = backend.draw(inputs, plan)
        z, o, p = update_(flat(y, w), inputs, w, bt, plan, alpha, beta, noise, backend)
        ctx.save_for_backward(x, weight, w, bt, z, None if o is z else o, p, alpha, beta, noise)
        ctx.plan, ctx.backend, ctx.dtypes = plan, backend, (a.dtype, b.dtype, None if rows is None else rows.dtype)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        """Returns the gradients of what needs one."""
        x, weight, w, bt, z, o, p, alpha, beta, noise = ctx.saved_tensors
        plan, backend = ctx.plan, ctx.backend
        need_y, need_x, _, _, need_a, need_b, need_rows, need_alpha, need_beta = ctx.needs_input_grad[:9]
        o, dy = z if o is None else o, dy.contiguous()  # attention hands over transposed ones, each product a copy
        gradients = backend.backward_y(flat(dy, w), bt, o, z, p, plan, alpha, beta, need_b)
        dx = da = drows = db = None
        if need_x:
            dx = None if weight is None else flat(torch.matmul(dy, weight), w)
            dx = backend.backward_x(gradients.dz, w, dx, plan, noise).view_as(x)
        kind_a, kind_b, kind_rows = ctx.dtypes
        if need_a or need_rows:
            dw = backend.backward_w(gradients.dz, flat(x, w), plan, noise)
            da = dw[..., : plan.rank, :].to(kind_a) if need_a else None
            drows = dw[..., plan.rank :, :].to(kind_rows) if need_rows else None
            drows = drows if drows is None or w.dim() == 2 else drows.sum(0)
        if need_b:
            db = gradients.dbt.mT.to(kind_b)
        return (
            dy if need_y else None,
            dx,
            None,
            None,
            da,
            db,
            drows,
            gradients.dalpha if need_alpha else None,
            gradients.dbeta if need_beta else None,
            None,
            None,
        )
