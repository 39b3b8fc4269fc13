"""What becomes of tasks that a checkpoint does not know: an error, the nearest known task row by row, or the mean row.

The tables of the loaded module then hold this run's tasks first (known ones by name, unknown ones as the mean of the
checkpoint's rows) and the checkpoint's other tasks after them. Shapes: B batch, T tasks of this run, K known tasks.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor

from moe_peft.batch import Batch
from moe_peft.checkpoint import check_adapter_names, describe, refuse_foreign
from moe_peft.data.tasks import TaskSpec
from moe_peft.methods.evaluation import routed_shares
from moe_peft.methods.nearest_task import nearest_task
from moe_peft.methods.task_rows import resize, sources, with_heads, with_rows
from moe_peft.predictions import Prediction

if TYPE_CHECKING:
    from moe_peft.methods.more import MoRE

UnknownTask = Literal["error", "nearest", "mean"]


class UnknownTasks:
    """Which rows of a module's task tables are known, and where the rows of unknown tasks are routed.

    Args:
        how: what to do with an unknown task.
        specs: the run's tasks.
    """

    def __init__(self, how: UnknownTask, specs: Sequence[TaskSpec]) -> None:
        self.how: UnknownTask = how
        self.here = [spec.name for spec in specs]
        self.row_names = list(self.here)
        """Names of all rows of the tables."""
        self.known = list(range(len(self.here)))
        """Rows of the known tasks, in the checkpoint's order (which decides ties of `nearest`)."""

    @property
    def tasks(self) -> list[int]:
        """The unknown ones among this run's tasks."""
        return [task for task in range(len(self.here)) if task not in self.known]

    def load(self, module: "MoRE", checkpoint: dict[str, Any]) -> None:
        """Rearranges a checkpoint of other tasks, and grows the module's tables to fit it.

        Raises:
            ValueError: a checkpoint of another method or base, or classifier heads that it lacks.
        """
        module.configure_model()
        refuse_foreign(checkpoint, describe(module), tasks=False)
        check_adapter_names(module.adapter_state(), checkpoint["state_dict"])
        about = checkpoint["moe_peft"]
        there: list[str] = about["tasks"]
        self.row_names = self.here + [name for name in there if name not in self.here]
        self.known = [self.row_names.index(name) for name in there]
        if there != self.here:
            if self.tasks and module.heads is not None:
                name = self.here[self.tasks[0]]
                raise ValueError(f"task {name!r} is unknown to the checkpoint, which has no head for it; leave it out")
            state = with_rows(module, checkpoint["state_dict"], sources(there, self.row_names))
            checkpoint["state_dict"] = with_heads(module, state, about)
        resize(module, len(self.row_names))
        if self.tasks and self.how == "nearest" and module.representation is None:
            rank_zero_warn("unknown_task: nearest means little here; the checkpoint was trained without TaskContrast")

    def routed(self, module: "MoRE", batch: Batch) -> Tensor:
        """Returns the table rows [B] that route a batch; -1 is the mean of all rows.

        Raises:
            ValueError: see `nearest_task`.
        """
        own = batch["task_id"]
        if self.how != "nearest" or module.training:
            return own
        known = torch.tensor(self.known, device=own.device)
        unknown = torch.isin(own, known, invert=True)
        if not unknown.any():
            return own
        tables = {slot: selector.task_embeddings()[known] for slot, selector in module.selectors().items()}
        asked = Batch(input_ids=batch["input_ids"][unknown], prompt_mask=batch["prompt_mask"][unknown])
        return own.index_put((unknown,), known[nearest_task(module, asked, tables, module.representation or "mean")])

    def notes(self, specs: Sequence[TaskSpec], predictions: Sequence[Prediction]) -> dict[str, str]:
        """Returns how unknown tasks were routed, by task: what a table of results must say."""
        if self.how == "mean":
            return {self.here[task]: "unknown to the checkpoint, routed by the mean embedding" for task in self.tasks}
        notes = {}
        for task, shares in routed_shares(specs, predictions).items():
            parts = [f"{name} ({share:.0%})" for name, share in sorted(shares.items(), key=lambda item: -item[1])]
            notes[task] = f"unknown to the checkpoint, routed as {', '.join(parts)}"
        return notes
