"""Routers that need no gradient: what they know is sums over the rows of every expert, exact in any order.

Sums of different rows can be added: over steps, over data-parallel ranks, over years. So an expert that comes later
needs the rows of its own task only. Shapes: B rows, d features, E experts.
"""

import torch
from torch import Tensor
from torch.distributed import all_reduce, is_available, is_initialized

from moe_peft.layers.expert_router import ExpertRouter


class ClosedFormRouter(ExpertRouter):
    """Base of both: the sums in fp64, as buffers, and a solution that is made again when they changed."""

    counts: Tensor
    """[E] rows seen."""
    sums: Tensor
    """[E, d'] sum of the features of each expert's rows."""
    per_expert = ("counts", "sums")

    def build(self, width: int, experts: int, device: torch.device | str | None = None) -> None:
        """Creates the sums at zero."""
        self.register_buffer("counts", torch.zeros(experts, device=device, dtype=torch.float64))
        self.register_buffer("sums", torch.zeros(experts, width, device=device, dtype=torch.float64))

    @torch.no_grad()
    def observe(self, features: Tensor, experts: Tensor) -> None:
        """Adds rows to the sums; on every data-parallel rank the rows of all ranks.

        Args:
            features: [B, d].
            experts: [B], which expert each row belongs to.
        """
        with torch.autocast(features.device.type, enabled=False):
            prepared = self.prepare(features).double()
            for name, part in self.parts(prepared, experts).items():
                if is_available() and is_initialized():
                    all_reduce(part)
                self.get_buffer(name).add_(part)

    def parts(self, features: Tensor, experts: Tensor) -> dict[str, Tensor]:
        """Returns what prepared features [B, d] in fp64 add to each buffer."""
        own = torch.nn.functional.one_hot(experts, len(self.counts)).to(features.dtype)
        return {"counts": own.sum(0), "sums": own.T @ features}

    def add(self, new: int, features: Tensor, experts: Tensor) -> None:
        """Adds the new expert's rows to the sums."""
        own = experts == new
        self.observe(features[own], experts[own])

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
        if ridge <= 0:
            raise ValueError(f"ridge: {ridge} may leave no unique solution; give more than 0, for example 1e-3")
        self.ridge = ridge
        self._solution: tuple[tuple[int, int], Tensor] | None = None

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
        state = self.gram._version, self.gram.data_ptr()
        if self._solution is None or self._solution[0] != state:
            size = len(self.gram)
            mean = (self.gram.diagonal().mean()).clamp(min=torch.finfo(torch.float64).tiny)
            regular = self.gram + self.ridge * mean * torch.eye(size, device=self.gram.device, dtype=torch.float64)
            self._solution = state, torch.linalg.solve(regular, self.sums.T).float()
        return self._solution[1]
