"""What methods share that transform the outputs of linears (`layers.transformed`), for all tasks or by task."""

from typing import Any, ClassVar

from torch import Tensor

from moe_peft.batch import Batch
from moe_peft.methods.base import MultitaskModule
from moe_peft.methods.task_ids import check_task_ids


class OutputTransform(MultitaskModule):
    """Base of such methods.

    Args:
        per_task: every task has its own transform, picked by the task of a row; false: all share one.
        common: the arguments of `MultitaskModule`.
    """

    task_decides: ClassVar[bool] = True

    def __init__(self, per_task: bool = False, **common: Any) -> None:
        super().__init__(**common)
        self.per_task = per_task

    @property
    def copies(self) -> int:
        """How many transforms a linear has."""
        return len(self.specs) if self.per_task else 1

    def routed_tasks(self, batch: Batch) -> Tensor | None:
        """Returns the rows' tasks [B].

        Raises:
            ValueError: tasks have their own transforms, and a row has no task or an unknown one.
        """
        own = batch.get("task_id")
        if self.per_task and self.context.enabled:
            check_task_ids(own, len(self.specs), needed_by=type(self).__name__)
        return own
