"""One entry to the gated low-rank update: picks the fastest form that is right for where it runs.

The update is taken in three steps so that a router can read rank space in between: `shrink` (one product with the
stacked rows [A; W_router]), the core in fp32 rank space (`reference.apply_core`), `expand` (one product, in place on
the base output). Nothing larger than rank space is kept for backward, besides x by reference.
"""

import torch
from torch import Tensor
from torch.nn.functional import linear


def shrink(x: Tensor, rows: Tensor) -> Tensor:
    """Projects x to rank space: [..., D] x [R, D] -> [..., R], computed in the dtype of x."""
    return linear(x, rows.to(x.dtype))


class _ExpandInPlace(torch.autograd.Function):
    """y += scale * o B^T, writing into y; keeps o and B only."""

    @staticmethod
    def forward(ctx, y: Tensor, o: Tensor, b: Tensor, scale: float) -> Tensor:  # noqa: ANN001
        ctx.save_for_backward(o, b)
        ctx.scale = scale
        ctx.mark_dirty(y)
        y.view(-1, y.shape[-1]).addmm_(o.reshape(-1, o.shape[-1]), b.mT, alpha=scale)
        return y

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:  # noqa: ANN001
        o, b = ctx.saved_tensors
        do = (dy @ b) * ctx.scale
        db = (dy.reshape(-1, dy.shape[-1]).mT @ o.reshape(-1, o.shape[-1])) * ctx.scale
        return dy, do, db, None


def expand(y: Tensor, o: Tensor, b: Tensor, scale: float) -> Tensor:
    """Returns y + scale * o B^T in the dtype of y, in place where autograd and the compiler allow it.

    Args:
        y: [..., O], the base linear's fresh output; its contents are overwritten in eager mode.
        o: [..., Q] rank-space activations after the core.
        b: [O, Q].
        scale: constant factor s.
    """
    o, b = o.to(y.dtype), b.to(y.dtype)
    needs_own_copy = torch.compiler.is_compiling() or not y.is_contiguous() or (y.is_leaf and y.requires_grad)
    if needs_own_copy:
        return y + scale * linear(o, b)
    return _ExpandInPlace.apply(y, o, b, scale)
