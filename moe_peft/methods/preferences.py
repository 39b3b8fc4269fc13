"""Preferences λ among tasks, points on the simplex, that annealed training draws: one for each step of the optimizer.

A draw depends on the seed and the step alone: all ranks and all micro-batches of a step have the same, and so has a
resumed fit.
"""

import os

import numpy as np
import torch
from torch import Tensor


class PreferenceSampler:
    """Base of all samplers.

    Args:
        seed: of the draws; the run's own (`seed_everything`) where not given.
    """

    def __init__(self, seed: int | None = None) -> None:
        if seed is not None and seed < 0:
            raise ValueError(f"seed: {seed} must not be negative")
        self._seed = seed

    def rng(self, step: int) -> np.random.Generator:
        """Returns the generator of a step."""
        seed = int(os.environ.get("PL_GLOBAL_SEED", 0)) if self._seed is None else self._seed
        return np.random.default_rng([seed, step])

    def check(self, tasks: int) -> None:
        """Raises a ValueError for a number of tasks that it cannot serve."""

    def draw(self, tasks: int, step: int, progress: float) -> Tensor:
        """Returns λ [T], fp32.

        Args:
            tasks: T.
            step: of the optimizer.
            progress: share of all steps that are done, 0 to 1.
        """
        raise TypeError(f"{type(self).__name__} must implement draw(tasks, step, progress)")


class AnnealedDirichlet(PreferenceSampler):
    """Dirichlet(p (1 - t) + 0.001) at progress t: anywhere on the simplex first, at a corner in the end.

    Args:
        concentration: p.
        seed: of the draws; the run's own (`seed_everything`) where not given.
    """

    def __init__(self, concentration: float = 1.0, seed: int | None = None) -> None:
        super().__init__(seed)
        if concentration <= 0:
            raise ValueError(f"concentration: {concentration} must be above 0; 1 starts uniform on the simplex")
        self.concentration = concentration

    def draw(self, tasks: int, step: int, progress: float) -> Tensor:
        """Returns λ [T]."""
        each = self.concentration * (1 - progress) + 1e-3
        return torch.from_numpy(self.rng(step).dirichlet(np.full(tasks, each))).float()


class AnnealedLattice(PreferenceSampler):
    """λ ∝ point^(5 t) of points spread evenly over the simplex: its centre first, its corners in the end.

    Args:
        divisions: of every edge, n: points have coordinates 0/n … n/n; for two or three tasks.
        sharpness: the factor of t.
        seed: of the draws; the run's own (`seed_everything`) where not given.
    """

    def __init__(self, divisions: int = 10, sharpness: float = 5.0, seed: int | None = None) -> None:
        super().__init__(seed)
        if divisions < 1:
            raise ValueError(f"divisions: {divisions} must be at least 1, which leaves the corners")
        if sharpness <= 0:
            raise ValueError(f"sharpness: {sharpness} must be above 0, which would leave the centre alone")
        self.divisions, self.sharpness = divisions, sharpness

    def check(self, tasks: int) -> None:
        """Refuses any number of tasks but two and three."""
        if tasks not in (2, 3):
            raise ValueError(f"sampler: AnnealedLattice is for 2 or 3 tasks, not {tasks}; use AnnealedDirichlet")

    def draw(self, tasks: int, step: int, progress: float) -> Tensor:
        """Returns λ [T]."""
        self.check(tasks)
        axes = np.indices((self.divisions + 1,) * (tasks - 1)).reshape(tasks - 1, -1)
        last = self.divisions - axes.sum(0)
        points = np.vstack([axes, last])[:, last >= 0] / self.divisions
        point = points[:, self.rng(step).integers(points.shape[1])] ** (self.sharpness * progress)
        return torch.from_numpy(point / point.sum()).float()
