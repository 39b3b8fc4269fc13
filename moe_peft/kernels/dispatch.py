"""One entry to the gated low-rank update: picks the fastest form that is right for where it runs.

The update is taken in three steps so that a router can read rank space in between: `shrink` (one product with the
stacked rows [A; W_router]), the core in fp32 rank space (`reference.apply_core`), `expand` (one product, in place on
the base output). Nothing larger than rank space is kept for backward, besides x by reference.

Factors may also belong to the rows of a batch, one pair each: A [B, R, D] and B [B, O, Q] for x [B, ..., D].
"""

import torch
from torch import Tensor
from torch.nn.functional import linear


def _grouped(tensor: Tensor, factor: Tensor) -> Tensor:
    """Brings [..., D] to [N, D] for a shared factor [·, ·], [B, ..., D] to [B, S, D] for one factor per row."""
    lead = (-1,) if factor.dim() == 2 else (len(tensor), -1)
    return tensor.reshape(*lead, tensor.shape[-1])


def shrink(x: Tensor, rows: Tensor) -> Tensor:
    """Projects x to rank space in its own dtype.

    Args:
        x: [..., D], or [B, ..., D] where rows have their own factors.
        rows: [R, D], or [B, R, D].

    Returns:
        [..., R].
    """
    rows = rows.to(x.dtype).contiguous()  # a tensor train's A comes transposed, which costs products threefold
    if rows.dim() == 2:
        return linear(x, rows)
    grouped = _grouped(x, rows)
    plain = torch.compiler.is_compiling() or not torch.is_grad_enabled()  # a Function costs more than a decoding step
    h = torch.bmm(grouped, rows.mT) if plain else _ShrinkByRow.apply(grouped, rows)
    return h.view(*x.shape[:-1], rows.shape[1])


class _ShrinkByRow(torch.autograd.Function):
    """x A^T for one A per row; backward makes dA in its own memory order, which autograd's own does not."""

    @staticmethod
    def forward(ctx, x: Tensor, rows: Tensor) -> Tensor:  # noqa: ANN001
        ctx.save_for_backward(x, rows)
        return torch.bmm(x, rows.mT)

    @staticmethod
    def backward(ctx, dh: Tensor) -> tuple[Tensor | None, Tensor | None]:  # noqa: ANN001
        x, rows = ctx.saved_tensors
        dh = dh.to(x.dtype)  # under autocast h has another one
        wanted = ctx.needs_input_grad
        return torch.bmm(dh, rows) if wanted[0] else None, torch.bmm(dh.mT, x) if wanted[1] else None


def _add(y: Tensor, o: Tensor, b: Tensor, scale: float) -> Tensor:
    """Adds scale * o B^T to y."""
    add = torch.Tensor.addmm_ if b.dim() == 2 else torch.Tensor.baddbmm_
    add(_grouped(y, b), _grouped(o, b), b.mT, alpha=scale)
    return y


class _ExpandInPlace(torch.autograd.Function):
    """y += scale * o B^T, writing into y; keeps o and B only."""

    @staticmethod
    def forward(ctx, y: Tensor, o: Tensor, b: Tensor, scale: float) -> Tensor:  # noqa: ANN001
        ctx.save_for_backward(o, b)
        ctx.scale = scale
        ctx.mark_dirty(y)
        return _add(y, o, b, scale)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:  # noqa: ANN001
        o, b = ctx.saved_tensors
        grouped = _grouped(dy, b)
        do = (grouped @ b).view_as(o) * ctx.scale
        db = (_grouped(o, b).mT @ grouped).mT * ctx.scale if ctx.needs_input_grad[2] else None
        return dy, do, db, None


def expand(y: Tensor, o: Tensor, b: Tensor, scale: float) -> Tensor:
    """Returns y + scale * o B^T in the dtype of y, in place where autograd and the compiler allow it.

    Args:
        y: [..., O], the base linear's fresh output; its contents are overwritten in eager mode.
        o: [..., Q] rank-space activations after the core.
        b: [O, Q], or [B, O, Q] for y [B, ..., O].
        scale: constant factor s.
    """
    o, b = o.to(y.dtype), b.to(y.dtype)
    needs_own_copy = torch.compiler.is_compiling() or not y.is_contiguous() or (y.is_leaf and y.requires_grad)
    if needs_own_copy:
        return y + scale * shrink(o, b)  # the same product: o [..., Q], b [O, Q]
    return _ExpandInPlace.apply(y, o, b, scale) if torch.is_grad_enabled() else _add(y, o, b, scale)
