"""What Lightning leaves out of an exact resume: the place within an epoch and a step, and the numbers of dropout."""

import logging
import os
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from numpy.random import SeedSequence

from moe_peft.kernels.gated import backend

logger = logging.getLogger(__name__)


class ExactResume(Callback):
    """Makes a resumed fit go on with the rows and the dropout that the uninterrupted one would have had.

    Its losses are the same bit for bit as long as what decides over rounding is the same; one line says what is not.
    """

    def __init__(self) -> None:
        self._loader_states: list[dict[str, Any]] = []
        self._here: dict[str, str | int] = {}
        self._there: dict[str, str | int] = {}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keeps the loader's position for the start of the fit."""
        loop = checkpoint.get("loops", {}).get("fit_loop", {})
        self._loader_states = loop.get("state_dict", {}).get("combined_loader", [])

    def state_dict(self) -> dict[str, Any]:
        """Returns what decides over rounding."""
        return {"conditions": self._here}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over what decided over rounding before."""
        self._there = state_dict["conditions"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Puts the loader back into the middle of its epoch, to where an optimizer step begins.

        Lightning does so itself, but not for a step of several micro-batches, and not where the loader exists already:
        a schedule that asks for the step count makes it.

        Raises:
            ValueError: validations that come in the middle of an optimizer step.
        """
        refuse_validation_within_a_step(trainer)
        self._here = conditions(trainer, pl_module)
        if not self._loader_states:
            return
        state, place = self._loader_states.pop(), rewind(trainer)
        trainer.train_dataloader.load_state_dict(state if place is None else state | {"handed_out": place})  # type: ignore[union-attr]
        changed = [
            f"{name} is {value} and was {self._there[name]}"
            for name, value in self._here.items()
            if self._there.get(name, value) != value
        ]
        if changed and trainer.is_global_zero:
            logger.warning(
                "resumed, but not bit for bit: %s (the rows of every global batch are the same)", ", ".join(changed)
            )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Makes dropout a function of seed, rank and batch, so that a resumed fit draws what it would have drawn."""
        place = [int(os.environ.get("PL_GLOBAL_SEED", 0)), trainer.global_rank, trainer.fit_loop.total_batch_idx]
        torch.manual_seed(int(SeedSequence(place).generate_state(1)[0]))


def conditions(trainer: Trainer, module: LightningModule) -> dict[str, str | int]:
    """Gives all that decides over rounding and is no argument of the model, as plain types."""
    device = trainer.strategy.root_device
    cuda = device.type == "cuda"
    found: dict[str, str | int] = {
        "torch": str(torch.__version__),
        "threads": torch.get_num_threads(),
        "ranks": trainer.world_size,
        "strategy": type(trainer.strategy).__name__,
        "precision": str(trainer.precision),
        "device": torch.cuda.get_device_name(device) if cuda else f"CPU {torch.backends.cpu.get_cpu_capability()}",
    }
    if hasattr(module, "backbone"):  # the argument "auto" is another dtype, or kernel, on another machine
        found["dtype"] = str(module.backbone.dtype)  # type: ignore[union-attr]
        found["kernels"] = backend(module.context.kernels, cuda).__name__  # type: ignore[union-attr]
    return found


def refuse_validation_within_a_step(trainer: Any) -> None:
    """Refuses validations between the micro-batches of an optimizer step, as no fit can go on from there.

    Raises:
        ValueError: names the interval and what would do.
    """
    every, window = trainer.val_check_batch, trainer.accumulate_grad_batches
    if every in (None, float("inf"), trainer.num_training_batches) or not trainer.enable_validation:
        return
    if every % window:
        raise ValueError(
            f"trainer.val_check_interval={trainer.val_check_interval!r}: a validation every {every} batches falls "
            f"within an optimizer step of accumulate_grad_batches={window}; use a multiple of {window}"
        )


def rewind(trainer: Trainer) -> int | None:
    """Sets Lightning's counters back to the beginning of the optimizer step that a checkpoint was written in.

    Where it was written as a step ended, Lightning's own restart is right, and nothing is changed.

    Returns:
        The micro-batches of this epoch before that step; None where nothing was changed.
    """
    loop, window = trainer.fit_loop.epoch_loop, trainer.accumulate_grad_batches
    progress, now = loop.batch_progress, loop.batch_progress.current.state_dict()
    ready, processed = now["ready"], now["processed"]
    if ready == processed and (ready % window == 0 or progress.is_last_batch):
        return None
    place = processed // window * window
    for count in (progress.total, progress.current):
        count.load_state_dict(dict.fromkeys(now, count.ready - ready + place))
    progress.is_last_batch = False
    # Lightning would take this for a step that has just ended, and see to its validation; that is done, and counted.
    loop.reset_restart_stage()
    loop._batches_that_stepped -= 1  # the loop's start adds it again
    return place
