"""What training steps were, over all ranks, in plain numbers.

A step looks at its loss once, to see whether it is finite: the one moment at which a GPU is waited for. What else there
is to tell of it comes along then, in the same reduction over ranks, so that nobody who wants to tell it waits again.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, Self

import torch
from torch import Tensor

from moe_peft.batch import IGNORE_INDEX, Batch
from moe_peft.data.tasks import TaskSpec

if TYPE_CHECKING:
    from moe_peft.methods.base import MultitaskModule


class StepFacts(NamedTuple):
    """One micro-batch of all ranks, or the sum of several."""

    batches: int
    """How many micro-batches."""
    loss: float
    """Their losses, summed."""
    tokens: int
    """Tokens read, of prompts and answers, padding left out."""
    rows: tuple[int, ...]
    """[T] rows of every task; 0 for all where the step had no task loss."""
    losses: tuple[float, ...]
    """[T] the rows' own mean losses, summed by task."""

    @classmethod
    def of(cls, packed: list[float], ranks: int) -> Self:
        """Reads what `pack` gave, averaged over ranks."""
        loss, *sums = packed
        tokens, *sums = [value * ranks for value in sums]
        rows, losses = sums[: len(sums) // 2], sums[len(sums) // 2 :]
        return cls(1, loss, round(tokens), tuple(map(round, rows)), tuple(losses))

    def plus(self, other: Self) -> Self:
        """Returns the sum of both."""
        return type(self)(
            self.batches + other.batches,
            self.loss + other.loss,
            self.tokens + other.tokens,
            tuple(own + more for own, more in zip(self.rows, other.rows, strict=True)),
            tuple(own + more for own, more in zip(self.losses, other.losses, strict=True)),
        )

    def task_means(self, specs: Sequence[TaskSpec]) -> dict[str, float]:
        """Returns the mean loss of every task's rows, by name; tasks without rows are absent."""
        known = zip(specs, self.rows, self.losses, strict=True)
        return {spec.name: loss / rows for spec, rows, loss in known if rows}


def pack(module: "MultitaskModule", loss: Tensor, row_loss: Tensor | None, batch: Batch) -> Tensor:
    """Joins this rank's facts of a micro-batch into one vector, without waiting for the device.

    Args:
        module: its tasks and its backbone's kind.
        loss: the whole loss.
        row_loss: [B] the rows' own losses, if the step has computed them.
        batch: the batch.

    Returns:
        [2 + 2 T]: loss, tokens, rows by task, summed losses by task.
    """
    tokens = batch["attention_mask"].sum()
    if module.backbone.kind == "seq2seq":  # whose answers are not among the input tokens
        tokens = tokens + (batch["labels"] != IGNORE_INDEX).sum()
    tasks = len(module.specs)
    sums = loss.new_zeros(2, tasks)
    if row_loss is not None:
        own = batch["task_id"].unsqueeze(1) == torch.arange(tasks, device=loss.device)
        # Not a scattered sum: those add in another order every time on a GPU.
        sums = torch.stack([own, row_loss.detach().unsqueeze(1).where(own, 0.0)]).sum(1)
    return torch.cat([torch.stack([loss.detach(), tokens]), sums.flatten()])
