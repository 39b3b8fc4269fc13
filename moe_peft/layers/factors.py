"""Factors: what an adapter stores. Every kind yields the two matrices A [R, D] and B [O, Q] of the low-rank update.

Shapes: D in, O out, R rows of A, Q columns of B.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from moe_peft.layers.tensor_train import Layout, fold
from moe_peft.sharding import edited

TrainInit = Literal["zero", "official"]
"""How tensor-train cores start (see `TensorTrainFactors`)."""


class Factors(nn.Module):
    """Base of all factor kinds: a module whose forward returns (A [R, D], B [O, Q])."""

    rank_in: int
    """R, rows of A."""
    rank_out: int
    """Q, columns of B."""

    def forward(self) -> tuple[Tensor, Tensor]:
        """Returns A [R, D] and B [O, Q] in fp32."""
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


class TensorTrainFactors(Factors):
    """The cores of a tensor train (TT-LoRA, arXiv 2408.01008), or of one per expert, merged into A and B when needed.

    Args:
        layout: how the matrix is cut into modes.
        rank: r, at every inner bond where the modes allow it.
        init: "zero": the last core is zero, so that the update starts at exactly zero; the other cores give A the
            variance of a LoRA's and a step of the last core the size of a LoRA's step of B. "official": every core
            uniform and divided by its own Frobenius norm, so that the update starts tiny, not at zero.
        experts: E trains of the same layout, stacked; None holds one.
        device: where to create them.
    """

    def __init__(
        self,
        layout: Layout,
        rank: int,
        init: TrainInit = "zero",
        experts: int | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if init not in ("zero", "official"):
            raise ValueError(f"init: {init!r} is unknown; use zero or official")
        self.layout, self.rank, self.experts = layout, rank, experts
        self.rank_in = self.rank_out = layout.ranks(rank)[len(layout.inputs)]
        lead = () if experts is None else (experts,)
        shapes = layout.shapes(rank)
        self.cores = nn.ParameterList(
            nn.Parameter(torch.empty(*lead, *shape, device=device, dtype=torch.float32)) for shape in shapes
        )
        self._start(init)

    @torch.no_grad()
    def _start(self, init: TrainInit) -> None:
        """Draws directions, then gives every core its norm: products of many cores would else vary a lot in size."""
        if self.cores[0].is_meta:  # where every one of these operations takes as long as it does on numbers
            return
        inputs = len(self.layout.inputs)
        spread = (3 * math.prod(self.layout.inputs)) ** (-0.5 / inputs)
        for at, core in enumerate(self.cores):
            before, size, after = core.shape[-3:]
            core.uniform_(-1, 1)
            core.div_(torch.linalg.vector_norm(core, dim=(-3, -2, -1), keepdim=True) + 1e-6)
            if init == "zero":
                std = spread / before**0.5 if at < inputs else after**-0.5
                core.mul_(std * (before * size * after) ** 0.5)
        if init == "zero":
            self.cores[-1].zero_()

    def forward(self, chosen: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Returns A [R, D] and B [O, R], or those of the chosen experts [n]: A [n, R, D] and B [n, O, R].

        Only what is chosen is computed; nothing of the size [E, R, D] is. Folding all experts where they are fewer than
        the rows would save a little, and sum in another order on a rank that has fewer rows.
        """
        cores = list(self.cores) if chosen is None else [core.index_select(0, chosen) for core in self.cores]
        with torch.autocast(cores[0].device.type, enabled=False):
            return fold(cores, self.layout)

    @torch.no_grad()
    def set_cores(self, cores: Sequence[Tensor], expert: int | None = None) -> None:
        """Copies a train of the same layout into the cores, as it is; zeros fill bonds that are wider here.

        Args:
            cores: [r_{k-1}, s_k, r_k] each.
            expert: whose cores, where there are several.
        """
        for core, given in zip(self.cores, cores, strict=True):
            with edited(core) as value:
                own = value if expert is None else value[expert]
                own.zero_()
                own[: given.shape[0], :, : given.shape[2]] = given

    def set_update(self, a: Tensor, b: Tensor, expert: int | None = None) -> float:
        """Makes the update what TT-SVD at this rank leaves of B A.

        Args:
            a: A [R', D].
            b: B [O, R'].
            expert: whose cores, where there are several.

        Returns:
            The relative error (see `compress`, also for what is refused).
        """
        from moe_peft.layers.compression import compress

        cores, error = compress(a, b, self.layout, self.rank)
        self.set_cores(cores, expert)
        return error
