"""Compressing a given update into a tensor train, by TensorLy's TT-SVD.

A low-rank update B A is never multiplied out: its two sides are orthogonalised, the input modes are decomposed with
the middle coordinate as a last mode, and what remains of it goes into the output modes. That is TT-SVD of ΔW itself,
mode by mode, so the error is the one TT-SVD would make. Shapes: D in, O out, R rank of the update, r_k of the train.
"""

import math
from collections.abc import Iterable

import tensorly
import torch
from tensorly.decomposition import tensor_train
from torch import Tensor

from moe_peft.layers.tensor_train import Layout, fold


@torch.no_grad()
def compress(a: Tensor, b: Tensor, layout: Layout, rank: int) -> tuple[list[Tensor], float]:
    """Decomposes an update B A into tensor-train cores.

    Args:
        a: A [R, D].
        b: B [O, R].
        layout: the modes.
        rank: r, at most, of every inner bond.

    Returns:
        The cores in the dtype of A, and the relative error ||ΔW - B A|| / ||B A|| (Frobenius; 0 for a zero update).

    Raises:
        ValueError: a value that is not finite, or sides that do not fit the layout.
    """
    if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
        raise ValueError("the update to compress holds values that are not finite: export it again from a sound run")
    if (a.shape[1], b.shape[0], a.shape[0]) != (math.prod(layout.inputs), math.prod(layout.outputs), b.shape[1]):
        raise ValueError(f"an update of shapes {list(a.shape)} and {list(b.shape)} does not fit modes {layout.modes}")
    ranks, split = layout.ranks(rank), len(layout.inputs)
    wide, right = a.double().mT, b.double()
    out_basis, triangle = torch.linalg.qr(right)
    left = (wide @ triangle.mT).reshape(*reversed(layout.inputs), -1)  # [m_p .. m_1, R'], ΔWᵀ = left out_basisᵀ
    left = left.permute(*reversed(range(split)), split)
    cores = _decompose(left, ranks[: split + 1])
    middle = cores.pop().squeeze(-1)  # [r_p, R']
    tail = (middle @ out_basis.mT).reshape(len(middle), *layout.outputs)
    first, second, *others = _decompose(tail, (1, len(middle), *ranks[split + 1 : -1]))
    cores += [torch.tensordot(first.squeeze(0), second, 1), *others]
    cores = _padded(cores, layout, rank)
    return [core.to(a.dtype) for core in cores], relative_error(*fold(cores, layout), a.double(), b.double())


def relative_error(a: Tensor, b: Tensor, a_given: Tensor, b_given: Tensor) -> float:
    """Returns ||B A - B' A'|| / ||B' A'|| in Frobenius norm, from products of skinny matrices only."""

    def inner(b1: Tensor, a1: Tensor, b2: Tensor, a2: Tensor) -> Tensor:
        return ((b1.mT @ b2) * (a1 @ a2.mT)).sum()

    given = inner(b_given, a_given, b_given, a_given)
    difference = inner(b, a, b, a) - 2 * inner(b, a, b_given, a_given) + given
    return (difference.clamp(min=0) / given).sqrt().item() if given > 0 else 0.0


def _decompose(tensor: Tensor, ranks: Iterable[int]) -> list[Tensor]:
    """TT-SVD of a tensor at the ranks before its modes, clipped to what its values can fill."""
    with tensorly.backend_context("pytorch", local_threadsafe=True):  # pyright: ignore[reportAttributeAccessIssue]
        return list(tensor_train(tensor, [*ranks, 1]).factors)  # pyright: ignore[reportReturnType]


def _padded(cores: list[Tensor], layout: Layout, rank: int) -> list[Tensor]:
    """Fills cores up with zeros to the shapes of the layout, where the update has a lower rank than the train."""
    full = []
    for core, shape in zip(cores, layout.shapes(rank), strict=True):
        new = core.new_zeros(shape)
        new[: core.shape[0], :, : core.shape[2]] = core
        full.append(new)
    return full
