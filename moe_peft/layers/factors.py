"""Factors: what an adapter stores. Every kind yields the two matrices A [R, D] and B [O, Q] of the low-rank update.

Shapes: D in, O out, R rows of A, Q columns of B.
"""

import math

import torch
from torch import Tensor, nn


class Factors(nn.Module):
    """Base of all factor kinds: a module whose forward returns (A [R, D], B [O, Q])."""

    rank_in: int
    """R, rows of A."""
    rank_out: int
    """Q, columns of B."""

    def forward(self) -> tuple[Tensor, Tensor]:
        """Returns A [R, D] and B [O, Q], as stored (fp32)."""
        raise TypeError(f"{type(self).__name__} must implement forward() -> (A, B)")


class DenseFactors(Factors):
    """Two plain matrices; A starts Kaiming-uniform (a = sqrt 5), B at zero, so that the update starts at exactly zero.

    Args:
        in_features: D.
        out_features: O.
        rank_in: R.
        rank_out: Q.
        device: where to create them (the base weight's device, "meta" for counting).
    """

    def __init__(
        self, in_features: int, out_features: int, rank_in: int, rank_out: int, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        self.rank_in, self.rank_out = rank_in, rank_out
        self.A = nn.Parameter(torch.empty(rank_in, in_features, device=device, dtype=torch.float32))
        self.B = nn.Parameter(torch.zeros(out_features, rank_out, device=device, dtype=torch.float32))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def forward(self) -> tuple[Tensor, Tensor]:
        """Returns the stored matrices themselves."""
        return self.A, self.B
