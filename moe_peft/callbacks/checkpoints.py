"""Checkpoints of a run: `<run>/checkpoints/best.ckpt` and `last.ckpt`, adapters only."""

from pathlib import Path
from typing import Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint


class AdapterCheckpoint(ModelCheckpoint):
    """Keeps the best and the last checkpoint of a fit in the run folder.

    Args:
        monitor: the value that decides; None keeps the last only.
        mode: whether the monitored value should grow ("max") or shrink ("min").
        every_n_train_steps: also save after so many optimizer steps; None saves after every validation.
    """

    def __init__(
        self,
        monitor: str | None = "val/mean",
        mode: Literal["min", "max"] = "max",
        every_n_train_steps: int | None = None,
    ) -> None:
        super().__init__(
            filename="best",
            monitor=monitor,
            mode=mode,
            save_last=True,
            save_top_k=1,
            every_n_train_steps=every_n_train_steps,
            auto_insert_metric_name=False,
            enable_version_counter=False,
        )

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Puts the checkpoints into the run folder, whatever loggers there are."""
        if self.dirpath is None:
            self.dirpath = str(Path(trainer.default_root_dir).absolute() / "checkpoints")
        super().setup(trainer, pl_module, stage)
