"""The configuration of a fit, written beside what it trains."""

import os
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger


class RunConfig(SaveConfigCallback):
    """Writes the merged configuration of a fit to <run>/config.yaml; other commands write none."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Writes nothing yet: a fit that fails before its first step must not leave what looks like a run."""

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        """Writes once, on rank zero, as soon as a batch has gone through."""
        if self.already_saved or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        self.already_saved = True
        if trainer.is_global_zero:
            path = Path(trainer.default_root_dir) / "config.yaml"
            self.parser.save(self.config, path, skip_none=False, overwrite=True, multifile=False)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Takes back the empty TensorBoard files that Lightning made for a fit that never began."""
        if self.already_saved or not trainer.is_global_zero or trainer.ckpt_path is not None:
            return
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.finalize("failed")
                folder = Path(logger.log_dir)
                for file in [*folder.glob(f"events.out.tfevents.*.{os.getpid()}.*"), folder / "hparams.yaml"]:
                    file.unlink(missing_ok=True)
                remove_if_empty(folder)
        remove_if_empty(Path(trainer.default_root_dir))


def remove_if_empty(folder: Path) -> None:
    """Removes a folder that has nothing in it, if there is one."""
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
