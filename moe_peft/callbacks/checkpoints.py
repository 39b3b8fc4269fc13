"""Checkpoints of a run: `<run>/checkpoints/best.ckpt` and `last.ckpt`, adapters only."""

from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn


class AdapterCheckpoint(ModelCheckpoint):
    """Keeps the best and the last checkpoint of a fit in the run folder.

    Args:
        monitor: the value that decides; None keeps the latest.
        mode: whether the monitored value should grow ("max") or shrink ("min").
        every_n_train_steps: renew the last checkpoint after so many optimizer steps too; None only after validations.

    Raises:
        ValueError: every_n_train_steps below 1.
    """

    def __init__(
        self,
        monitor: str | None = "val/mean",
        mode: Literal["min", "max"] = "max",
        every_n_train_steps: int | None = None,
    ) -> None:
        if every_n_train_steps is not None and every_n_train_steps < 1:
            raise ValueError(f"every_n_train_steps={every_n_train_steps} must be 1 or more, or null")
        # Lightning's own option would wait for the monitored value, and give up saving after validations.
        self.renew_every = every_n_train_steps
        self._renewed_at = 0
        super().__init__(
            filename="best",
            monitor=monitor,
            mode=mode,
            save_last=True,
            save_top_k=1,
            auto_insert_metric_name=False,
            enable_version_counter=False,
        )

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Puts the checkpoints into the run folder, whatever loggers there are."""
        if self.dirpath is None:
            self.dirpath = str(Path(trainer.default_root_dir).absolute() / "checkpoints")
        super().setup(trainer, pl_module, stage)

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        """Renews the last checkpoint between validations."""
        if self.renew_every is not None and trainer.global_step % self.renew_every == 0:
            self._renew_last(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves the best, then renews the last checkpoint also where nothing got better."""
        super().on_validation_end(trainer, pl_module)
        fitting = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
        if fitting and not self._should_save_on_train_epoch_end(trainer):
            self._renew_unless_saved(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Does the same where Lightning puts off a validation's saving until the epoch ends."""
        super().on_train_epoch_end(trainer, pl_module)
        if self._should_save_on_train_epoch_end(trainer):
            self._renew_unless_saved(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Makes the last checkpoint that of the last step, also where a fit ends between validations."""
        self._renew_unless_saved(trainer)

    def forget_best(self, trainer: Trainer) -> None:
        """Lets the next validation be the best one: what is monitored means something else than before."""
        for path in self.best_k_models:
            self._remove_checkpoint(trainer, path)
        self.best_k_models, self.kth_best_model_path = {}, ""
        self.best_model_score, self.best_model_path, self.current_score = None, "", None

    def _renew_unless_saved(self, trainer: Trainer) -> None:
        if self._last_global_step_saved != trainer.global_step:
            self._renew_last(trainer)

    def _renew_last(self, trainer: Trainer) -> None:
        if self._renewed_at == trainer.global_step or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        self._renewed_at, validated = trainer.global_step, self._last_global_step_saved
        self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
        self._last_global_step_saved = validated  # or a validation after this very step would not save

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        """Writes beside the file and then replaces it: a full disk leaves the last whole checkpoint where it was.

        Raises:
            OSError: the checkpoint cannot be written; one line that names it.
        """
        part = Path(f"{filepath}.part")
        try:
            super()._save_checkpoint(trainer, str(part))
            if trainer.is_global_zero:
                part.replace(filepath)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise OSError(
                f"cannot write {filepath} ({error.strerror}): free the disk or choose another run folder, then resume "
                "from the last checkpoint"
            ) from None
        self._last_checkpoint_saved = filepath
