"""Progress where there is no terminal to draw a bar on: one plain line every so many steps."""

import time

from lightning.pytorch import Callback, LightningModule, Trainer

from moe_peft.batch import Batch


class PlainProgress(Callback):
    """Prints step, loss and speed; silent where Lightning draws its own bar.

    Args:
        every_n_steps: optimizer steps between two lines.
    """

    def __init__(self, every_n_steps: int = 20) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps: {every_n_steps} is below 1")
        self.every_n_steps = every_n_steps
        self._since = (0.0, 0)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the clock."""
        self._since = time.monotonic(), trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: Batch, batch_idx: int
    ) -> None:
        """Prints a line at every n-th optimizer step, on rank zero."""
        step = trainer.global_step
        start, before = self._since
        if trainer.progress_bar_callback is not None or step - before < self.every_n_steps:
            return
        now = time.monotonic()
        self._since = now, step
        if trainer.is_global_zero:
            loss = float(trainer.callback_metrics["train/loss"])
            total = int(trainer.estimated_stepping_batches)
            print(f"step {step}/{total}  loss {loss:.3f}  {(now - start) / (step - before):.2f} s/step", flush=True)
