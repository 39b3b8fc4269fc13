"""The rules that decide of which tasks the rows of a batch are; which rows those are is planned in `planning`."""

from collections.abc import Sequence

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from moe_peft.data.planning import Batches, Sampling, draw


class Proportional(Sampling):
    """As often as a task has rows.

    Without replacement and with an epoch defined by the data, an epoch is every row exactly once; its last batch is
    filled up from the next permutation (with `batches: single_task`, the last batch of every task).

    Args:
        batches: mixed draws a task per row, single_task one task per batch.
        replacement: Whether a row may come twice before all rows of its task came once.
    """

    def weights(self, names: Sequence[str], sizes: NDArray[np.int64]) -> NDArray[np.float64]:
        """Shares of the rows."""
        return sizes / sizes.sum()

    def steps(self, sizes: NDArray[np.int64], batch_size: int) -> int:
        """One pass over the data: per task where a batch holds one task."""
        if self.batches == "single_task" and not self.replacement:
            return int((-(-sizes // batch_size)).sum())
        return super().steps(sizes, batch_size)

    def tasks(
        self, names: Sequence[str], sizes: NDArray[np.int64], steps: int, batch_size: int, rng: Generator
    ) -> NDArray[np.int64]:
        """Deals the rows out rather than drawing: a permutation of one entry per row (or per batch) and task."""
        if self.replacement:
            return super().tasks(names, sizes, steps, batch_size, rng)
        single = self.batches == "single_task"
        deck = np.repeat(np.arange(len(sizes)), -(-sizes // batch_size) if single else sizes)
        dealt = deck[draw(len(deck), steps if single else steps * batch_size, False, rng)]
        return np.repeat(dealt[:, None], batch_size, axis=1) if single else dealt.reshape(steps, batch_size)


class Temperature(Sampling):
    """By size to the power 1 / temperature: 1 is proportional, large is uniform.

    Args:
        temperature: Above 0.
        batches: mixed draws a task per row, single_task one task per batch.
        replacement: Whether a row may come twice before all rows of its task came once.
    """

    def __init__(self, temperature: float = 2.0, batches: Batches = "mixed", replacement: bool = False) -> None:
        super().__init__(batches, replacement)
        if not temperature > 0:
            raise ValueError(f"temperature={temperature} must be above 0; 1 is proportional, large is uniform.")
        self.temperature = temperature

    def weights(self, names: Sequence[str], sizes: NDArray[np.int64]) -> NDArray[np.float64]:
        """Powers of the shares."""
        powers = (sizes / sizes.max()) ** (1 / self.temperature)
        return powers / powers.sum()


class ExponentialShare(Sampling):
    """MoRE's balanced sampling: softmax of the tasks' shares of the rows, near uniform whatever the sizes.

    Args:
        batches: mixed draws a task per row, single_task one task per batch (as MoRE does).
        replacement: Whether a row may come twice before all rows of its task came once.
    """

    def weights(self, names: Sequence[str], sizes: NDArray[np.int64]) -> NDArray[np.float64]:
        """Softmax of the shares."""
        exponentials = np.exp(sizes / sizes.sum())
        return exponentials / exponentials.sum()


class Uniform(Sampling):
    """Every task equally often on average.

    Args:
        batches: mixed draws a task per row, single_task one task per batch.
        replacement: Whether a row may come twice before all rows of its task came once.
    """

    def weights(self, names: Sequence[str], sizes: NDArray[np.int64]) -> NDArray[np.float64]:
        """Equal shares."""
        return np.full(len(sizes), 1 / len(sizes))


class RoundRobin(Uniform):
    """The tasks in turn, row by row (mixed) or batch by batch (single_task).

    Args:
        batches: mixed or single_task.
        replacement: Whether a row may come twice before all rows of its task came once.
    """

    def tasks(
        self, names: Sequence[str], sizes: NDArray[np.int64], steps: int, batch_size: int, rng: Generator
    ) -> NDArray[np.int64]:
        """Counts through the tasks; every epoch starts at another one."""
        first = int(rng.integers(len(names)))
        if self.batches == "single_task":
            return np.repeat(((first + np.arange(steps)) % len(names))[:, None], batch_size, axis=1)
        return ((first + np.arange(steps * batch_size)) % len(names)).reshape(steps, batch_size)


class FixedWeights(Sampling):
    """Weights by task name.

    Args:
        task_weights: One number per task, not negative; relative to their sum. 0 leaves a task out of training.
        batches: mixed draws a task per row, single_task one task per batch.
        replacement: Whether a row may come twice before all rows of its task came once.
    """

    def __init__(self, task_weights: dict[str, float], batches: Batches = "mixed", replacement: bool = False) -> None:
        super().__init__(batches, replacement)
        if min(task_weights.values(), default=0) < 0 or not sum(task_weights.values()) > 0:
            raise ValueError(f"task_weights={task_weights} must not be negative and not all 0.")
        self.task_weights = task_weights

    def weights(self, names: Sequence[str], sizes: NDArray[np.int64]) -> NDArray[np.float64]:
        """The given weights, normalised."""
        if set(names) != set(self.task_weights):
            raise ValueError(
                f"task_weights names {', '.join(sorted(self.task_weights))}; give one weight for each task: "
                f"{', '.join(names)}."
            )
        given = np.array([self.task_weights[name] for name in names], dtype=np.float64)
        if given.sum() <= 0:
            raise ValueError(f"task_weights={self.task_weights} must not all be 0.")
        return given / given.sum()


class EqualRows(Uniform):
    """Exactly equally many rows of every task in every batch; the batch size must be a multiple of the tasks.

    Where a device cannot hold rows of all tasks at once, raise batch_size and accumulate_grad_batches together: an
    optimizer step then visits the tasks in rounds.

    Args:
        replacement: Whether a row may come twice before all rows of its task came once.
    """

    def __init__(self, replacement: bool = False) -> None:
        super().__init__("mixed", replacement)

    def tasks(
        self, names: Sequence[str], sizes: NDArray[np.int64], steps: int, batch_size: int, rng: Generator
    ) -> NDArray[np.int64]:
        """Shuffles the same multiset of tasks for every batch, so that accumulation slices are mixed too."""
        if batch_size % len(names):
            below = batch_size // len(names) * len(names)
            sizes_that_work = " or ".join(str(size) for size in (below, below + len(names)) if size)
            raise ValueError(
                f"batch_size={batch_size} cannot hold equally many rows of {len(names)} tasks; use {sizes_that_work}."
            )
        deck = np.repeat(np.arange(len(names)), batch_size // len(names))
        return rng.permuted(np.tile(deck, (steps, 1)), axis=1)
