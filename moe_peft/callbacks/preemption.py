"""A process that is told to go ends between two optimizer steps, with a checkpoint to go on from.

Lightning's own handlers act wherever a signal finds them: SLURM's requeueing saves in the middle of a step, and SIGTERM
talks to other ranks that may be in the middle of another collective. Here a handler only takes note, and all ranks act
together where the next step begins.
"""

import logging
import signal
import threading
from collections.abc import Callable
from typing import Any

from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException

from moe_peft.callbacks.checkpoints import AdapterCheckpoint

logger = logging.getLogger(__name__)


class Preemption(Callback):
    """Saves `last.ckpt` and ends the fit after SIGTERM; has Lightning requeue a SLURM job after its signal."""

    def __init__(self) -> None:
        self._came: set[int] = set()
        self._requeue: tuple[int, Callable[..., Any]] | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes the signals over from Lightning, which restores them after the fit."""
        self._came, self._requeue = set(), None
        if threading.current_thread() is not threading.main_thread():
            return
        signal.signal(signal.SIGTERM, self._note)
        environment = trainer._accelerator_connector.cluster_environment
        if isinstance(environment, SLURMEnvironment) and environment.auto_requeue and environment.requeue_signal:
            handler = signal.signal(environment.requeue_signal, self._note)
            if callable(handler):
                self._requeue = environment.requeue_signal, handler

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Acts on what came, where an optimizer step begins.

        Raises:
            SIGTERMException: SIGTERM came, and the fit is saved.
        """
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._act(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Acts on what came during the last step or validation: no test is begun.

        Raises:
            SIGTERMException: SIGTERM came, and the fit is saved.
        """
        self._act(trainer)

    def _note(self, signum: int, frame: object) -> None:
        self._came.add(signum)

    def _act(self, trainer: Trainer) -> None:
        if self._requeue is not None and self._has_come(trainer, self._requeue[0]):
            signum, handler = self._requeue
            handler(signum, None)
        if not self._has_come(trainer, signal.SIGTERM):
            return
        saved = "nothing"
        for checkpoint in trainer.checkpoint_callbacks:
            if isinstance(checkpoint, AdapterCheckpoint):
                checkpoint.renew_last(trainer)
                saved = checkpoint.last_model_path
        if trainer.is_global_zero:
            step, how = trainer.global_step, "go on with the same command and --ckpt_path last"
            logger.warning("SIGTERM: stopped at step %d, saved %s; %s", step, saved, how)
        raise SIGTERMException

    def _has_come(self, trainer: Trainer, signum: int) -> bool:
        """Whether the signal has come to any rank; all ranks ask together, and forget it."""
        came = trainer.strategy.reduce_boolean_decision(signum in self._came, all=False)
        self._came.discard(signum)
        return came
