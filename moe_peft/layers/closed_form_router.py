"""Routers that need no gradient: what they know is sums over the rows of every expert, exact in any order.

Sums of different rows can be added: over steps, over data-parallel ranks, over years. So an expert that comes later
needs the rows of its own task only. Shapes: B rows, d features, E experts.
"""

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor
from torch.distributed import all_reduce, is_available, is_initialized

from moe_peft.layers.expert_router import ExpertRouter


class ClosedFormRouter(ExpertRouter):
    """Base of both: the sums as buffers, which stay in fp64 whatever dtype the rest of a model is brought to."""

    counts: Tensor
    """[E] rows seen."""
    sums: Tensor
    """[E, d'] sum of the features of each expert's rows."""
    per_expert = ("counts", "sums")

    @torch.inference_mode(False)  # sums made in inference mode could not be added to outside of it
    def build(self, width: int, experts: int, device: torch.device | str | None = None) -> None:
        """Creates the sums at zero."""
        self.register_buffer("counts", torch.zeros(experts, device=device, dtype=torch.float64))
        self.register_buffer("sums", torch.zeros(experts, width, device=device, dtype=torch.float64))

    @torch.inference_mode(False)
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        exact = dict(self.named_buffers())
        super()._apply(fn, recurse)
        for name, moved in self.named_buffers():
            if moved.dtype != exact[name].dtype:  # half() and the like: follow to the device only
                self.register_buffer(name, exact[name].to(moved.device))
        return self

    def observe(self, features: Tensor, experts: Tensor) -> None:
        """Adds the rows of a training batch to the sums; every data-parallel process adds the rows of all.

        Args:
            features: [B, d].
            experts: [B], which expert each row belongs to.

        Raises:
            ValueError: a feature that is not finite.
        """
        self._sum_up(features, experts, together=is_available() and is_initialized())

    @torch.no_grad()
    def _sum_up(self, features: Tensor, experts: Tensor, together: bool = False, times: float = 1.0) -> None:
        prepared = self.prepare(features).double()  # autocast leaves fp64 alone
        if not torch.isfinite(prepared).all():  # no later row would make up for it
            raise ValueError(
                "the router's features hold values that are not finite; give the backbone a dtype of wider range"
            )
        for name, part in self.parts(prepared, experts).items():
            if together:
                all_reduce(part)
            self.get_buffer(name).add_(part, alpha=times)

    def parts(self, features: Tensor, experts: Tensor) -> dict[str, Tensor]:
        """Returns what prepared features [B, d] in fp64 add to each buffer."""
        own = torch.nn.functional.one_hot(experts, len(self.counts)).to(features.dtype)
        return {"counts": own.sum(0), "sums": own.T @ features}

    def rows_to_add(self) -> int:
        """As many as an expert has on average; stage two counts a row in every epoch."""
        return round((self.counts.sum() / (self.counts > 0).sum().clamp(min=1)).item())

    def add(self, new: int, features: Tensor, experts: Tensor) -> None:
        """Adds the new expert's rows to the sums; several processes give the same rows each.

        They count as often as the rows of an old expert on average, since ridge regression leans towards those with
        more.
        """
        own = experts == new
        if own.any():
            self._sum_up(features[own], experts[own], times=self.rows_to_add() / int(own.sum()))

    def scores(self, features: Tensor) -> Tensor:
        """Returns [B, E]; minus infinity for an expert of which no row was seen."""
        return self.compare(features).masked_fill(self.counts == 0, float("-inf"))

    def compare(self, features: Tensor) -> Tensor:
        """Returns the scores [B, E] as if every expert had been seen."""
        raise NotImplementedError


class PrototypeRouter(ClosedFormRouter):
    """The nearest centroid: z_e = -||f - c_e||² / 2d, c_e the mean feature of expert e's rows.

    An expert's score depends on its own rows only, so one more expert changes none of the others.
    """

    def compare(self, features: Tensor) -> Tensor:
        """Returns z; no larger than zero, which only a centroid itself reaches."""
        centroids = (self.sums / self.counts.clamp(min=1).unsqueeze(1)).float()
        return torch.cdist(features, centroids, compute_mode="donot_use_mm_for_euclid_dist").square() / (
            -2 * features.shape[1]
        )


class RidgeRouter(ClosedFormRouter):
    """Ridge regression onto one-hot expert ids: W = (G + λ I)⁻¹ S, z = Wᵀ [f, 1].

    G = Σ [f, 1][f, 1]ᵀ and S, the sum by expert, hold all there is to know of the rows: one more expert gives the very
    solution that all rows together would. Its old rows do move.

    Args:
        normalise: see `ExpertRouter`.
        ridge: λ, in units of the mean of G's diagonal.

    Raises:
        ValueError: a ridge that is not above 0.
    """

    gram: Tensor
    """G [d + 1, d + 1]."""

    def __init__(self, normalise: bool = True, ridge: float = 1e-3) -> None:
        super().__init__(normalise)
        if not ridge > 0:
            raise ValueError(f"ridge: {ridge} may leave no unique solution; give more than 0, for example 1e-3")
        self.ridge = ridge
        self._solved: tuple[list[tuple[int, int]], tuple[Tensor, ...], Tensor] | None = None
        """The state of the sums, the sums themselves (kept, so that no others can get their address), and W."""

    @torch.inference_mode(False)
    def build(self, width: int, experts: int, device: torch.device | str | None = None) -> None:
        """Creates the sums at zero."""
        super().build(width + 1, experts, device)
        self.register_buffer("gram", torch.zeros(width + 1, width + 1, device=device, dtype=torch.float64))

    def parts(self, features: Tensor, experts: Tensor) -> dict[str, Tensor]:
        """Adds G to what every closed-form router sums."""
        features = torch.nn.functional.pad(features, (0, 1), value=1.0)
        return super().parts(features, experts) | {"gram": features.T @ features}

    def compare(self, features: Tensor) -> Tensor:
        """Returns z: about 1 for the row's own expert and 0 for the others."""
        return torch.nn.functional.pad(features, (0, 1), value=1.0) @ self.solution()

    @torch.no_grad()
    def solution(self) -> Tensor:
        """Returns W [d + 1, E] in fp32, solved in fp64 once per state of the sums."""
        sums = self.gram, self.sums
        state = [(part._version, part.data_ptr()) for part in sums]
        if self._solved is None or self._solved[0] != state:
            mean = self.gram.diagonal().mean().clamp(min=torch.finfo(torch.float64).tiny)
            regular = self.gram + self.ridge * mean * torch.eye(len(self.gram), device=mean.device, dtype=mean.dtype)
            self._solved = state, sums, torch.linalg.solve(regular, self.sums.T).float()
        return self._solved[2]
