"""Checkpoints of a run: `<run>/checkpoints/best.ckpt` and `last.ckpt`, adapters only.

`last.ckpt` is there to go on from. It is written where an optimizer step begins, when all of the step before is done:
logged, validated, its epoch ended. The one before it stays as `last.previous.ckpt`, so that whenever a process is
killed, one of the two is whole.
"""

import os
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn

from moe_peft.resumption import previous_of


class AdapterCheckpoint(ModelCheckpoint):
    """Keeps the best and the last checkpoint of a fit in the run folder.

    The last one is renewed after validations and epochs, at the end, and as often in between as the arguments say.

    Args:
        monitor: the value that decides; None keeps the latest.
        mode: whether the monitored value should grow ("max") or shrink ("min").
        every_n_train_steps: renew the last checkpoint after so many optimizer steps too.
        every_n_minutes: renew it too once it is so old; rank zero's clock decides.

    Raises:
        ValueError: every_n_train_steps below 1, or every_n_minutes not above 0.
    """

    def __init__(
        self,
        monitor: str | None = "val/mean",
        mode: Literal["min", "max"] = "max",
        every_n_train_steps: int | None = None,
        every_n_minutes: float | None = None,
    ) -> None:
        if every_n_train_steps is not None and every_n_train_steps < 1:
            raise ValueError(f"every_n_train_steps={every_n_train_steps} must be 1 or more, or null")
        if every_n_minutes is not None and not every_n_minutes > 0:
            raise ValueError(f"every_n_minutes={every_n_minutes} must be above 0, or null")
        # Lightning's own options would wait for the monitored value, and give up saving after validations.
        self.renew_steps, self.renew_minutes = every_n_train_steps, every_n_minutes
        self._owed = False
        """Whether a validation or an epoch has ended since the last checkpoint was renewed."""
        self._renewed_at, self._renewed_when = 0, 0.0
        super().__init__(
            filename="best",
            monitor=monitor,
            mode=mode,
            save_top_k=1,
            auto_insert_metric_name=False,
            enable_version_counter=False,
        )

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Puts the checkpoints into the run folder, whatever loggers there are."""
        if self.dirpath is None:
            self.dirpath = str(Path(trainer.default_root_dir).absolute() / "checkpoints")
        super().setup(trainer, pl_module, stage)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Finds the best checkpoint of a run whose folder was moved or renamed since, which Lightning would forget."""
        folder, state = Path(str(self.dirpath)), checkpoint["callbacks"].get(self.state_key)
        if state is None or Path(str(trainer.ckpt_path)).resolve().parent != folder.resolve():
            return

        def here(path: str) -> str:
            return str(folder / Path(path).name) if path else ""

        state.update({name: here(path) for name, path in state.items() if name.endswith("_model_path")})
        state["best_k_models"] = {here(path): score for path, score in state["best_k_models"].items()}
        state["dirpath"] = self.dirpath

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the clock, and clears away what a killed process left half written."""
        super().on_train_start(trainer, pl_module)
        self._renewed_at, self._renewed_when = trainer.global_step, time.monotonic()
        if trainer.is_global_zero:
            for file in Path(str(self.dirpath)).glob("*.part"):
                file.unlink()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Renews the last checkpoint where an optimizer step begins."""
        if batch_idx % trainer.accumulate_grad_batches == 0 and self._is_due(trainer):
            self.renew_last(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves the best; the last checkpoint follows, also where nothing got better."""
        super().on_validation_end(trainer, pl_module)
        self._owed |= trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Does the same where Lightning puts off a validation's saving until the epoch ends."""
        super().on_train_epoch_end(trainer, pl_module)
        self._owed = True

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Makes the last checkpoint that of the last step."""
        if self._owed or trainer.global_step != self._renewed_at:
            self.renew_last(trainer)

    def renew_last(self, trainer: Trainer) -> None:
        """Writes the last checkpoint; all ranks call it.

        Raises:
            OSError: it cannot be written; one line that names it.
        """
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        last = Path(str(self.dirpath)) / "last.ckpt"
        with _whole(trainer, last, keep=True) as part:
            trainer.save_checkpoint(part, weights_only=False)
        self.last_model_path = str(last)
        self._owed, self._renewed_at, self._renewed_when = False, trainer.global_step, time.monotonic()

    def forget_best(self, trainer: Trainer) -> None:
        """Lets the next validation be the best one: what is monitored means something else than before."""
        for path in self.best_k_models:
            self._remove_checkpoint(trainer, path)
        self.best_k_models, self.kth_best_model_path = {}, ""
        self.best_model_score, self.best_model_path, self.current_score = None, "", None

    def _is_due(self, trainer: Trainer) -> bool:
        if self._owed or trainer.global_step == self._renewed_at:
            return self._owed
        if self.renew_steps is not None and trainer.global_step % self.renew_steps == 0:
            return True
        if self.renew_minutes is None:
            return False
        return trainer.strategy.broadcast(time.monotonic() - self._renewed_when >= 60 * self.renew_minutes)

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        with _whole(trainer, Path(filepath)) as part:
            super()._save_checkpoint(trainer, str(part))
        self._last_checkpoint_saved = filepath


@contextmanager
def _whole(trainer: Trainer, path: Path, keep: bool = False) -> Iterator[Path]:
    """Has a file written beside `path`, then replaces: a kill or a full disk leaves the last whole one where it was.

    Args:
        trainer: whose rank zero writes.
        path: the checkpoint.
        keep: keep the one that is replaced; one that is cut off would push out the whole one before it.

    Raises:
        OSError: the checkpoint cannot be written; one line that names it.
    """
    part = path.with_name(f"{path.name}.part")
    try:
        yield part
        if trainer.is_global_zero:
            with part.open("rb") as file:
                os.fsync(file.fileno())
            if keep and path.is_file() and zipfile.is_zipfile(path):
                path.replace(previous_of(path))
            part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise OSError(
            f"cannot write {path} ({error.strerror}): free the disk or choose another run folder, then resume from the "
            "last checkpoint"
        ) from None
