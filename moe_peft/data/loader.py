"""How an epoch's training plan reaches one process: slices of global batches, and a loader that can resume."""

import hashlib
import signal
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader, Dataset, Sampler

from moe_peft.batch import Batch
from moe_peft.data.collate import Collator
from moe_peft.data.encoding import EncodedRow
from moe_peft.data.planning import Sampling


class MicroBatch(NamedTuple):
    """One process's rows of one forward, and its share of the global batch."""

    rows: list[int]
    rows_share: float
    tokens_share: float
    task_share: list[float]


class MultitaskSampler(Sampler[MicroBatch]):
    """Yields this process's micro-batches: global batch, then accumulation slice, then rank slice.

    Args:
        sampling: The task-weight rule.
        names: T task names.
        sizes: Rows per task.
        answer_tokens: Answer tokens of every row, all tasks in a row.
        batch_size: Rows of a global batch.
        steps_per_epoch: Global batches of an epoch; None lets the data decide.
        seed: The run's seed.
        world_size: Number of ranks.
        rank: This process.
        accumulation: Micro-batches of one optimizer step.

    Raises:
        ValueError: The batch size does not divide by ranks x accumulation, or a rule that does not fit the tasks.
    """

    def __init__(
        self,
        sampling: Sampling,
        names: Sequence[str],
        sizes: Sequence[int],
        answer_tokens: Sequence[int],
        batch_size: int,
        steps_per_epoch: int | None = None,
        seed: int = 0,
        world_size: int = 1,
        rank: int = 0,
        accumulation: int = 1,
    ) -> None:
        check_batch_size(batch_size, world_size, accumulation)
        if steps_per_epoch is not None and steps_per_epoch < 1:
            raise ValueError(f"steps_per_epoch={steps_per_epoch} must be 1 or more, or null for one pass.")
        self.sampling, self.names, self.sizes = sampling, list(names), list(sizes)
        self.batch_size, self.steps_per_epoch, self.seed = batch_size, steps_per_epoch, seed
        self.world_size, self.rank, self.accumulation = world_size, rank, accumulation
        self.epoch = 0
        self.resume_at: tuple[int, int] | None = None
        """After a resume: an epoch, and how many of its micro-batches were handed out before."""
        self._tokens = np.asarray(answer_tokens, dtype=np.int64)
        self._steps = len(self.plan(0))

    def plan(self, epoch: int) -> np.ndarray:
        """Gives the rows of an epoch's global batches: [steps, batch_size]."""
        return self.sampling.plan(
            self.names, self.sizes, self.batch_size, self.steps_per_epoch, seed=self.seed, epoch=epoch
        )

    def identity(self, epoch: int) -> dict[str, int | str]:
        """Gives what decides which rows the n-th micro-batch of an epoch holds, over all ranks together."""
        return {
            "accumulate_grad_batches": self.accumulation,
            "batch_size": self.batch_size,
            "seed": self.seed,
            "rows": hashlib.sha256(self.plan(epoch).tobytes()).hexdigest(),
        }

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch to yield next (Lightning calls this)."""
        self.epoch = epoch

    @property
    def position(self) -> int:
        """Where the next iteration starts: not at 0 if a resumed run is in the middle of this epoch.

        A run that ended by its step limit has closed its last epoch, whatever was left of it: going on from there is a
        new epoch, from its beginning.
        """
        return self.resume_at[1] if self.resume_at and self.resume_at[0] == self.epoch else 0

    def __len__(self) -> int:
        """Counts the micro-batches of an epoch."""
        return self._steps * self.accumulation

    def __iter__(self) -> Iterator[MicroBatch]:
        """Yields the epoch's micro-batches of this rank."""
        plan, start, parts = self.plan(self.epoch), self.position, self.world_size * self.accumulation
        self.resume_at = None
        for index in range(start, len(self)):
            rows = plan[index // self.accumulation]
            own = rows.reshape(parts, -1)[index % self.accumulation * self.world_size + self.rank]
            of_task = np.bincount(self._task_of(rows), minlength=len(self.sizes)) / parts
            yield MicroBatch(
                own.tolist(),
                len(rows) / parts,
                float(self._tokens[rows].sum()) / parts,
                of_task[self._task_of(own)].tolist(),
            )

    def _task_of(self, rows: np.ndarray) -> np.ndarray:
        """Gives the task of every row number."""
        return np.searchsorted(np.cumsum(self.sizes), rows, side="right")


def check_batch_size(batch_size: int, world_size: int, accumulation: int) -> None:
    """Refuses a global batch size that ranks x accumulation cannot share equally.

    Raises:
        ValueError: Names the three numbers and the nearest sizes that work.
    """
    parts = world_size * accumulation
    if batch_size < 1 or batch_size % parts:
        below = max(batch_size, 0) // parts * parts
        working = " or ".join(str(size) for size in (below, below + parts) if size)
        raise ValueError(
            f"batch_size={batch_size} (global) must divide by {world_size} ranks x {accumulation} accumulation steps; "
            f"use {working}."
        )


class TrainRows(Dataset[Batch]):
    """Encoded training rows of all tasks, collated by the micro-batch."""

    def __init__(self, rows: list[EncodedRow], collator: Collator) -> None:
        self.rows = rows
        self.collator = collator

    def __getitem__(self, index: MicroBatch) -> Batch:
        """Collates one micro-batch."""
        rows = [self.rows[row] for row in index.rows]
        return self.collator.train(rows, index.rows_share, index.tokens_share, index.task_share)


class ResumableLoader(DataLoader[Batch]):
    """A training loader that a checkpoint can put back into the middle of an epoch.

    Lightning stores `state_dict` of loaders that have one. The count is of micro-batches handed out (as Lightning's own
    progress is), which is the same on all ranks and for any number of ranks. Its generator is its own: making an
    iterator must not draw from the global random state.

    Args:
        dataset: The rows.
        sampler: Their order.
        num_workers: Worker processes.
        seed: Seed of the workers' own random state.
    """

    def __init__(self, dataset: TrainRows, sampler: MultitaskSampler, num_workers: int, seed: int) -> None:
        super().__init__(
            dataset,
            sampler=sampler,
            batch_size=None,
            num_workers=num_workers,
            generator=torch.Generator().manual_seed(seed),
            worker_init_fn=outlive_sigterm,
        )
        self.multitask_sampler = sampler
        self.handed_out = 0

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        """Yields the rest of the epoch after a resume, whole epochs otherwise."""
        self.handed_out = self.multitask_sampler.position
        for batch in super().__iter__():
            self.handed_out += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Gives the position in the epoch, and what that position depends on."""
        sampler = self.multitask_sampler
        return {"epoch": sampler.epoch, "handed_out": self.handed_out, **sampler.identity(sampler.epoch)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on at the stored position when the stored epoch is iterated next.

        Raises:
            ValueError: The position means other rows here: the accumulation, batch size, seed or rows differ.
        """
        for argument, here in self.multitask_sampler.identity(state["epoch"]).items():
            if state[argument] == here:
                continue
            if argument == "rows":
                raise ValueError(
                    f"the checkpoint's epoch {state['epoch']} has other rows than this run's: tasks, sampling, "
                    "max_words, row limits and steps_per_epoch must be as they were to resume."
                )
            raise ValueError(
                f"{argument}={here} cannot resume a checkpoint made with {argument}={state[argument]}, whose place in "
                "the epoch would hold other rows; set it back, or start a new run."
            )
        self.multitask_sampler.resume_at = (state["epoch"], state["handed_out"])


def outlive_sigterm(worker: int) -> None:
    """Leaves a SIGTERM that comes to a whole process group to the process that needs this worker's batches."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def place_of(trainer: Trainer | None) -> tuple[int, int, int]:
    """Gives world size, rank and accumulation steps of a trainer; alone without one.

    Raises:
        ValueError: The trainer would slice batches that are sliced already.
    """
    if trainer is None:
        return 1, 0, 1
    if trainer.world_size > 1 and trainer._accelerator_connector.use_distributed_sampler:
        raise ValueError(
            "trainer.use_distributed_sampler=True would slice batches that are sliced already; set it to false."
        )
    return trainer.world_size, trainer.global_rank, trainer.accumulate_grad_batches
