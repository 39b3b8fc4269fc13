"""How a split is evaluated: single-task batches of similar length, the tasks in turn, shared out over the ranks."""

from collections.abc import Sequence
from itertools import zip_longest

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from moe_peft.batch import Batch
from moe_peft.data.collate import Collator
from moe_peft.data.encoding import EncodedRow
from moe_peft.data.loader import outlive_sigterm


class EvalBatches(Dataset[Batch]):
    """Evaluation batches, grouped beforehand."""

    def __init__(self, batches: list[list[EncodedRow]], collator: Collator) -> None:
        self.batches = batches
        self.collator = collator

    def __len__(self) -> int:
        """Counts the batches of this rank."""
        return len(self.batches)

    def __getitem__(self, index: int) -> Batch:
        """Collates one batch."""
        return self.collator.evaluate(self.batches[index])


def group_for_evaluation(
    rows: Sequence[EncodedRow], sequences: int, world_size: int = 1, rank: int = 0, packed: bool = False
) -> list[list[EncodedRow]]:
    """Groups rows into single-task batches of similar length, longest first, and takes this rank's part.

    The tasks take turns, so that the first batches (all that `limit_val_batches` lets through) hold every task. All
    ranks have equally many batches, as sharded models must: a rank for which nothing is left of a group gets a row that
    another rank has too, and which counts once (`methods.evaluation.gather`).

    Args:
        rows: All rows of a split.
        sequences: At most so many sequences (options) in a batch of one rank; a row is never torn apart.
        world_size: Number of ranks.
        rank: This process.
        packed: Whether a row's options lie side by side (`Collator.pack`), which makes its sequence that long.
    """
    together = sum if packed else max
    tasks: list[list[list[EncodedRow]]] = []
    for task in sorted({row.task_id for row in rows}):
        own = [row for row in rows if row.task_id == task]
        lengths = {row.row_id: len(row.prompt) + together(map(len, row.options or [[]])) for row in own}
        own.sort(key=lambda row: (-lengths[row.row_id], row.row_id))
        widest = max(len(row.options) or 1 for row in own)
        per_rank = max(sequences // widest, 1)
        groups = np.array_split(np.arange(len(own)), -(-len(own) // (per_rank * world_size)))
        tasks.append([[own[index] for index in _share(group, world_size, rank)] for group in groups])
    return [batch for turn in zip_longest(*tasks, fillvalue=[]) for batch in turn if batch]


def _share(group: np.ndarray, world_size: int, rank: int) -> np.ndarray:
    """Takes a rank's part of a group; where nothing is left for it, the first rank's first row once more."""
    own = group[rank::world_size]
    return own if len(own) else group[:1]


def evaluation_loader(dataset: EvalBatches, num_workers: int, seed: int) -> DataLoader[Batch]:
    """Loads ready-made batches in order, without drawing from the global random state.

    A plain DataLoader: Lightning rebuilds the loaders of `predict` from their constructor's arguments.

    Args:
        dataset: This rank's batches.
        num_workers: Worker processes.
        seed: Seed of the workers' own random state.
    """
    generator = torch.Generator().manual_seed(seed)
    return DataLoader(
        dataset, batch_size=None, num_workers=num_workers, generator=generator, worker_init_fn=outlive_sigterm
    )
