"""Progress of fits and evaluations: a bar on a terminal, plain lines anywhere else.

Every number of a fit is a plain mean over its last optimizer steps (`every_n_steps` of them, fewer at the start), over
all ranks and micro-batches: the loss, each task's own loss over its rows, seconds per step without validations, tokens
per second without padding. What is left counts the steps to come at this speed and the validations to come at the mean
of those so far; it is "more than" that until one has been timed.
"""

import math
import sys
import time
from collections import deque
from functools import reduce
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar

from moe_peft.callbacks.bar import Bar
from moe_peft.callbacks.pace import Pace, Schedule, time_limit
from moe_peft.callbacks.readings import Evaluation, Lines, Reading, View, validation_line
from moe_peft.methods.base import MultitaskModule
from moe_peft.methods.step_facts import StepFacts
from moe_peft.optim import parameter_groups


class Progress(Callback):
    """Tells of progress, on rank zero; silent where the trainer has a progress bar of another kind.

    Args:
        every_n_steps: optimizer steps between two plain lines, and those that the numbers are means over.

    Raises:
        ValueError: every_n_steps below 1.
    """

    def __init__(self, every_n_steps: int = 20) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps: {every_n_steps} is below 1; give the steps between two lines")
        self.every_n_steps = every_n_steps
        self.bar = True
        """Whether a terminal gets a bar (the command line takes it away for `trainer.enable_progress_bar: false`)."""
        self._view: View | None = None
        self._fit: RunningFit | None = None
        self._evaluation: Evaluation | None = None
        self._began = 0.0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Chooses how to tell."""
        self._view, self._fit, self._evaluation = None, None, None
        if trainer.is_global_zero and trainer.progress_bar_callback is None:
            self._view = Bar() if self.bar and Bar.suits(sys.stdout) else Lines(self.every_n_steps)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leaves the screen to what is said of it."""
        if self._view is not None:
            self._view.end()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leaves the screen."""
        if self._view is not None:
            self._view.end()

    # ---- a fit ------------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the clock, at the step where a resumed fit goes on."""
        if self._view is not None:
            assert isinstance(pl_module, MultitaskModule)
            self._fit = RunningFit(trainer, pl_module, self.every_n_steps)
            self._view.show(self._fit.reading(), None)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Tells of the first step, then of those that are due."""
        if self._view is None or self._fit is None or not self._fit.take():
            return
        if self._fit.steps == 1 or self._view.due(trainer.global_step):
            self._view.show(self._fit.reading(), None)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tells of the last step."""
        if self._view is not None and self._fit is not None:
            self._view.end(self._fit.reading())

    # ---- evaluations ------------------------------------------------------------------------------------------------

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stops the clock of the steps."""
        checking = trainer.sanity_checking
        batches = trainer.num_sanity_val_batches if checking else trainer.num_val_batches
        self._begin("sanity check" if checking else "validation", batches)
        if self._fit is not None:
            self._fit.pace.begin_validation()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begins a test."""
        self._begin("test", trainer.num_test_batches)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begins a prediction."""
        self._begin("predict", trainer.num_predict_batches)

    def on_validation_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Counts a batch."""
        self._count()

    def on_test_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Counts a batch."""
        self._count()

    def on_predict_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Counts a batch."""
        self._count()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tells a fit's validation scores, and goes on with its steps."""
        if self._view is None or self._fit is None:
            self._end()
            return
        seconds, self._evaluation = self._fit.validated(), None
        reading, found = self._fit.reading(), trainer.callback_metrics
        assert isinstance(pl_module, MultitaskModule)
        names = {spec.name: f"val/{spec.name}/{spec.primary_metric}" for spec in pl_module.specs}
        scores = {task: float(found[name]) for task, name in names.items() if name in found}
        mean = float(found["val/mean"]) if "val/mean" in found else None
        self._view.say(validation_line(reading.place, mean, scores, seconds), reading)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leaves the screen to the results."""
        self._end()

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leaves the screen to what is said of the predictions."""
        self._end()

    def _begin(self, name: str, batches: list[int | float]) -> None:
        self._began = time.monotonic()
        self._evaluation = Evaluation(name, 0, int(sum(batches)), 0.0)
        if self._view is not None and self._view.due(None):
            self._view.show(self._reading(), self._evaluation)

    def _count(self) -> None:
        assert self._evaluation is not None
        done, elapsed = self._evaluation.done + 1, time.monotonic() - self._began
        self._evaluation = self._evaluation._replace(done=done, elapsed=elapsed)
        if self._view is not None and self._view.due(None):
            self._view.show(self._reading(), self._evaluation)

    def _end(self) -> None:
        if self._view is not None:
            self._view.end(None, self._evaluation)

    def _reading(self) -> Reading | None:
        return None if self._fit is None else self._fit.reading()


class RunningFit:
    """The last steps of a fit that is under way.

    Args:
        trainer: its training has begun.
        module: what it trains.
        span: optimizer steps that numbers are means over.
    """

    def __init__(self, trainer: Trainer, module: MultitaskModule, span: int) -> None:
        self.pace = Pace(span)
        self.steps = 0
        """Optimizer steps of this process."""
        self._trainer, self._module = trainer, module
        self._schedule, self._step = Schedule(trainer), trainer.global_step
        self._validations = self._schedule.validations_after(self._step)
        self._steps: deque[StepFacts] = deque(maxlen=span)
        self._open: list[StepFacts] = []
        self._closed: frozenset[str] = frozenset()
        self._stage = ""

    def take(self) -> bool:
        """Takes the micro-batch that has just ended; returns whether an optimizer step has ended with it."""
        self._open.append(self._module.facts)
        if self._trainer.global_step == self._step:
            return False
        if self._module.closed_groups != self._closed:
            self._begin_stage()
        step, self._open = reduce(StepFacts.plus, self._open), []
        self._step, self.steps = self._trainer.global_step, self.steps + 1
        self._steps.append(step)
        self.pace.step(step.tokens)
        return True

    def _begin_stage(self) -> None:
        """Drops the steps of the stage before, whose losses and speed were others."""
        self._closed = self._module.closed_groups
        self._stage = ", ".join(name for name in parameter_groups(self._module) if name not in self._closed)
        self._steps.clear()
        self.pace.forget()

    def validated(self) -> float:
        """Takes the end of a validation and returns its seconds."""
        self._validations = max(0, self._validations - 1)
        return self.pace.end_validation()

    def reading(self) -> Reading:
        """Reads it all."""
        facts = reduce(StepFacts.plus, self._steps) if self._steps else None
        total = self._schedule.total
        left = self.pace.left(total - self._step, self._validations, time_limit(self._trainer))
        if left is not None and not self._schedule.counted:
            left = left._replace(whole=False)
        return Reading(
            step=self._step,
            total=math.inf if math.isinf(total) else int(total),
            stage=self._stage,
            loss=None if facts is None else facts.loss / facts.batches,
            tasks={} if facts is None else facts.task_means(self._module.specs),
            seconds_per_step=self.pace.seconds_per_step,
            tokens_per_second=self.pace.tokens_per_second,
            left=left,
            elapsed=self.pace.elapsed,
        )


def with_progress(callbacks: list[Callback], wanted: bool | None) -> tuple[list[Callback], bool]:
    """Adds our progress to a configuration's callbacks that have neither it nor a bar of Lightning's kind.

    Args:
        callbacks: those of the configuration.
        wanted: `trainer.enable_progress_bar`; not if false. Whether there is a terminal is found out where it runs.

    Returns:
        The callbacks, and whether the trainer is to have a bar of Lightning's kind.
    """
    if any(isinstance(callback, ProgressBar) for callback in callbacks):
        return callbacks, wanted is not False
    if not any(isinstance(callback, Progress) for callback in callbacks):
        callbacks = [*callbacks, Progress()]
    for callback in callbacks:
        if isinstance(callback, Progress):
            callback.bar = wanted is not False
    return callbacks, False
