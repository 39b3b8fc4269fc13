"""The plan of an epoch: which rows make up its global batches.

The plan is a pure function of (seed, epoch): every process makes the whole of it and takes its own slice, so neither
ranks, nor accumulation, nor loader workers change which rows a global batch holds.

Without replacement, a task's rows come in a permutation that is used up before the next one is drawn; every epoch
starts with fresh permutations. With replacement, every row is drawn anew. Which tasks the rows are of is a rule's
business (`moe_peft.data.sampling`).
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.random import Generator, default_rng
from numpy.typing import NDArray

Batches = Literal["mixed", "single_task"]


class Sampling:
    """A rule for the tasks of a batch's rows; subclass it and override `weights`.

    Args:
        batches: mixed draws a task per row, single_task one task per batch.
        replacement: Whether a row may come twice before all rows of its task came once.
    """

    def __init__(self, batches: Batches = "mixed", replacement: bool = False) -> None:
        self.batches = batches
        self.replacement = replacement

    def weights(self, names: Sequence[str], sizes: NDArray[np.int64]) -> NDArray[np.float64]:
        """Gives every task's share of the draws.

        Args:
            names: T task names.
            sizes: [T] rows per task.

        Returns:
            [T] probabilities that sum to 1.
        """
        raise NotImplementedError

    def steps(self, sizes: NDArray[np.int64], batch_size: int) -> int:
        """Global batches of an epoch that is defined by the data: enough for all rows, the last one filled up."""
        return -(-int(sizes.sum()) // batch_size)

    def tasks(
        self, names: Sequence[str], sizes: NDArray[np.int64], steps: int, batch_size: int, rng: Generator
    ) -> NDArray[np.int64]:
        """Draws the task of every row of an epoch: [steps, batch_size]."""
        weights = self.weights(names, sizes)
        if self.batches == "single_task":
            return np.repeat(rng.choice(len(names), size=(steps, 1), p=weights), batch_size, axis=1)
        return rng.choice(len(names), size=(steps, batch_size), p=weights)

    def plan(
        self, names: Sequence[str], sizes: Sequence[int], batch_size: int, steps: int | None, seed: int, epoch: int
    ) -> NDArray[np.int64]:
        """Plans an epoch.

        Args:
            names: T task names.
            sizes: Rows per task; the rows of all tasks are numbered through.
            batch_size: Rows of a global batch.
            steps: Global batches of the epoch; None lets the data decide.
            seed: The run's seed.
            epoch: The epoch.

        Returns:
            [steps, batch_size] row numbers.
        """
        counts = np.asarray(sizes, dtype=np.int64)
        steps = self.steps(counts, batch_size) if steps is None else steps
        tasks = self.tasks(names, counts, steps, batch_size, default_rng([seed, epoch, 0]))
        starts = np.concatenate([[0], counts.cumsum()[:-1]])
        rows = np.empty_like(tasks)
        for task, size in enumerate(counts):
            chosen = tasks == task
            rng = default_rng([seed, epoch, 1, task])
            rows[chosen] = starts[task] + draw(int(size), int(chosen.sum()), self.replacement, rng)
        return rows


def draw(size: int, count: int, replacement: bool, rng: Generator) -> NDArray[np.int64]:
    """Draws `count` of `size` numbers: independently, or from one permutation after another."""
    if replacement:
        return rng.integers(size, size=count)
    passes = -(-count // size) if size else 0
    return np.concatenate([np.empty(0, np.int64), *(rng.permutation(size) for _ in range(passes))])[:count]
