"""What Lightning leaves out of an exact resume: the place within an epoch, and the random numbers of dropout."""

import os
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from numpy.random import SeedSequence


class ExactResume(Callback):
    """Makes a resumed fit go on with the rows and the dropout that the uninterrupted one would have had."""

    def __init__(self) -> None:
        self._loader_states: list[dict[str, Any]] = []

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keeps the loader's position for the start of the fit."""
        loop = checkpoint.get("loops", {}).get("fit_loop", {})
        self._loader_states = loop.get("state_dict", {}).get("combined_loader", [])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Puts the loader back into the middle of its epoch.

        Lightning does so itself, unless the loader exists already: a schedule that asks for the step count makes it.
        """
        if self._loader_states:
            trainer.train_dataloader.load_state_dict(self._loader_states.pop())  # type: ignore[union-attr]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Makes dropout a function of seed, rank and batch, so that a resumed fit draws what it would have drawn."""
        place = [int(os.environ.get("PL_GLOBAL_SEED", 0)), trainer.global_rank, trainer.fit_loop.total_batch_idx]
        torch.manual_seed(int(SeedSequence(place).generate_state(1)[0]))
