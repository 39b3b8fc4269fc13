"""Tensor trains over a matrix: the mathematics of TT-LoRA (arXiv 2408.01008; layout of the official code).

A matrix ΔW [O, D] is seen as a tensor of p + q modes: first the p factors of D, then the q factors of O. Core k is
[r_{k-1}, s_k, r_k], with r_0 = r_d = 1 and d = p + q:

    T[i_1..i_p, j_1..j_q] = G_1[:, i_1, :] · … · G_p[:, i_p, :] · G_{p+1}[:, j_1, :] · … · G_d[:, j_q, :]

Index map, part of the checkpoint format: input x has the digits (i_p, …, i_1), row-major, so core 1 holds the least
significant digit; output y has the digits (j_1, …, j_q), row-major, so core p + 1 holds the most significant one:

    ΔW = T.permute(j_1..j_q, i_p..i_1).reshape(O, D)

The halves merge at the bond between them: ΔW = B A with A [r_p, D] and B [O, r_p]. So its rank is at most r_p, and two
skinny products apply it. Cores may carry leading dimensions (experts, rows), which every function here keeps.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Layout(NamedTuple):
    """How a matrix [O, D] is cut into modes."""

    inputs: tuple[int, ...]
    """m_1 .. m_p, whose product is D."""
    outputs: tuple[int, ...]
    """n_1 .. n_q, whose product is O."""

    @property
    def modes(self) -> tuple[int, ...]:
        """s_1 .. s_d."""
        return self.inputs + self.outputs

    def ranks(self, rank: int) -> tuple[int, ...]:
        """Returns r_0 .. r_d: `rank` at every inner bond, or less where fewer rows or columns are all there is.

        TensorLy validates the list and fills in the borders.

        Raises:
            ValueError: a rank below 1.
        """
        from tensorly.tt_tensor import validate_tt_rank

        if rank < 1:
            raise ValueError(f"rank: {rank} is below 1")
        modes = self.modes
        inner = [min(rank, math.prod(modes[:k]), math.prod(modes[k:])) for k in range(1, len(modes))]
        ranks: Any = (1, *inner, 1)  # typed as a string by TensorLy
        return tuple(int(r) for r in validate_tt_rank(modes, ranks))

    def shapes(self, rank: int) -> list[tuple[int, int, int]]:
        """Returns the shapes [r_{k-1}, s_k, r_k] of all cores."""
        ranks = self.ranks(rank)
        return list(zip(ranks[:-1], self.modes, ranks[1:], strict=True))


def layout_of(
    in_features: int, out_features: int, given: Sequence[Sequence[int]] | None = None, largest: int = 16
) -> Layout:
    """Returns the layout of a matrix [out_features, in_features].

    Args:
        in_features: D.
        out_features: O.
        given: input and output modes; None finds balanced ones (see `balanced_modes`).
        largest: see `balanced_modes`.

    Raises:
        ValueError: modes whose products are not D and O, or a side without modes.
    """
    if given is None:
        return Layout(balanced_modes(in_features, largest)[::-1], balanced_modes(out_features, largest))
    if len(given) != 2:
        raise ValueError(f"shapes: {given} must be two lists, the input modes and the output modes")
    for side, modes, size in (("input", given[0], in_features), ("output", given[1], out_features)):
        if not modes or min(modes) < 1 or math.prod(modes) != size:
            raise ValueError(
                f"shapes: the {side} modes {list(modes)} multiply to {math.prod(modes)}, but the linear has {size} "
                f"{side} features; give modes whose product is {size}"
            )
    return Layout(tuple(given[0]), tuple(given[1]))


def balanced_modes(size: int, largest: int = 16) -> tuple[int, ...]:
    """Cuts a size into as few increasing modes as are at most `largest`, as equal as its prime factors allow.

    A prime factor above `largest` stays whole: nothing is padded, so that every size has an exact tensor train.
    """
    primes, rest, divisor = [], size, 2
    while rest > 1:
        while rest % divisor == 0:
            primes.append(divisor)
            rest //= divisor
        divisor = divisor + 1 if divisor * divisor <= rest else max(rest, 2)
    whole = [prime for prime in primes if prime > largest]
    small = [prime for prime in primes if prime <= largest]
    modes = [1] * math.ceil(round(math.log(math.prod(small), largest), 9))
    for prime in reversed(small):
        at = min(range(len(modes)), key=modes.__getitem__)
        if modes[at] * prime > largest:
            modes.append(prime)
        else:
            modes[at] *= prime
    return tuple(sorted(modes + whole)) or (1,)


def fold(cores: Sequence[Tensor], layout: Layout) -> tuple[Tensor, Tensor]:
    """Merges the cores at the bond between inputs and outputs.

    Args:
        cores: d tensors [..., r_{k-1}, s_k, r_k].
        layout: p input modes, q output modes.

    Returns:
        A [..., r_p, D] and B [..., O, r_p].
    """
    split = len(layout.inputs)
    left = cores[0].squeeze(-3)  # [..., i_1, r_1]
    for core in cores[1:split]:
        # [..., m, x, r]: the new digit is more significant than those of x
        left = (left.unsqueeze(-3) @ core.transpose(-3, -2)).flatten(-3, -2)
    right = cores[-1].squeeze(-1)  # [..., r_{d-1}, j_q]
    for core in reversed(cores[split:-1]):
        right = (core @ right.unsqueeze(-3)).flatten(-2)  # [..., r, n, y]: more significant than those of y
    return left.mT, right.mT


def reconstruct(cores: Sequence[Tensor], layout: Layout) -> Tensor:
    """Returns the dense ΔW [..., O, D]: for merging, and the reference of `fold`."""
    lead = cores[0].shape[:-3]
    full = cores[0]
    for core in cores[1:]:
        full = (full.flatten(len(lead), -2) @ core.flatten(-2)).unflatten(-1, core.shape[-2:])
    full = full.reshape(*lead, *layout.modes)
    first, split, d = len(lead), len(layout.inputs), len(layout.modes)
    order = [first + k for k in (*range(split, d), *reversed(range(split)))]
    return full.permute(*range(first), *order).reshape(*lead, math.prod(layout.outputs), math.prod(layout.inputs))


def contract(x: Tensor, cores: Sequence[Tensor], layout: Layout) -> Tensor:
    """Returns x ΔWᵀ by eating one input digit and growing one output digit at a time, as the official code does.

    A reference: `fold` needs fewer operations for more than a few tokens (arXiv 2504.21190, "contraction").

    Args:
        x: [N, D].
        cores: d tensors [r_{k-1}, s_k, r_k].
        layout: their modes.

    Returns:
        [N, O].
    """
    split = len(layout.inputs)
    state = x.reshape(len(x), 1, *reversed(layout.inputs))  # [N, r, m_p .. m_1]
    for core in cores[:split]:
        state = torch.einsum("nr...m,rmp->np...", state, core)
    for core in cores[split:]:
        state = torch.einsum("nr...,rmp->np...m", state, core)
    return state.reshape(len(x), -1)
