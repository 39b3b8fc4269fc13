"""Learning curves of every task: `train/<task>/loss`, wherever the loss itself is logged."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import Optimizer

from moe_peft.methods.base import MultitaskModule
from moe_peft.methods.step_facts import StepFacts


class TaskLosses(Callback):
    """Logs the mean loss of each task's rows, of all ranks and of all steps since it was logged last.

    A batch has few rows of a task or none, so that one step's value would be noise. The sums are in the checkpoint, as
    they were where an optimizer step ends: a resumed fit logs what the uninterrupted one would have.
    """

    def __init__(self) -> None:
        self._open: list[StepFacts] = []
        """The micro-batches of the running optimizer step."""
        self._window = -1
        self._sum: StepFacts | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begins with whole steps only."""
        self._open = []

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes a micro-batch."""
        assert isinstance(pl_module, MultitaskModule)
        self._open.append(pl_module.facts)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Adds a step; which one says where the sums begin anew, whenever they were logged."""
        window = trainer.global_step // max(1, trainer.log_every_n_steps)  # type: ignore[attr-defined]
        if window != self._window:
            self._window, self._sum = window, None
        for facts in self._open:
            self._sum = facts if self._sum is None else self._sum.plus(facts)
        self._open = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Logs past Lightning's own collection, which would repeat the last value of a task that had no rows since."""
        logs = trainer._logger_connector
        if self._open or self._sum is None or not logs.should_update_logs:
            return
        assert isinstance(pl_module, MultitaskModule)
        means = self._sum.task_means(pl_module.specs)
        logs.log_metrics({f"train/{task}/loss": torch.tensor(mean, dtype=torch.double) for task, mean in means.items()})

    def state_dict(self) -> dict[str, Any]:
        """Returns the sums so far, as plain types."""
        return {"window": self._window, "sum": None if self._sum is None else list(self._sum)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from the sums of the interrupted fit."""
        self._window, found = state_dict["window"], state_dict["sum"]
        self._sum = None if found is None else StepFacts(*found)
