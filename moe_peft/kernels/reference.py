"""The gated low-rank update, in plain PyTorch: the specification that every faster form is tested against.

    y = y0 + s * B C(x) A x

Shapes: x [..., D], y0 [..., O], A [R, D], B [O, Q]. The core C maps rank space to rank space and comes in three forms,
told apart by its number of dimensions against x (its leading dimensions broadcast over those of x):

    None               identity           Q = R
    [..., R]           diagonal           Q = R, same number of dimensions as x
    [..., Q, R]        full matrix        one dimension more than x
"""

from torch import Tensor


def apply_core(h: Tensor, core: Tensor | None) -> Tensor:
    """Applies a core to rank-space activations.

    Args:
        h: [..., R].
        core: None, [..., R] (diagonal) or [..., Q, R] (matrix); leading dimensions broadcast.

    Returns:
        [..., Q], in the promoted dtype of `h` and `core`.
    """
    if core is None:
        return h
    if core.dim() == h.dim():
        return h * core
    if core.dim() == h.dim() + 1:
        return (core * h.unsqueeze(-2)).sum(-1)
    raise ValueError(f"core has {core.dim()} dimensions, activations have {h.dim()}: expected as many or one more")


def low_rank_update(
    y: Tensor, x: Tensor, a: Tensor, b: Tensor, core: Tensor | None = None, scale: float = 1.0
) -> Tensor:
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
