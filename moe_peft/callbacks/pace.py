"""How fast a fit goes, and how long it has yet to go, validations included."""

import math
import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Timer


class Left(NamedTuple):
    """What remains of a fit."""

    seconds: float
    whole: bool
    """False where something is not in it: validations, before the first one was timed."""


class Pace:
    """Times optimizer steps and validations apart.

    Args:
        span: speeds are means over so many steps.
        clock: a clock in seconds.
    """

    def __init__(self, span: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._steps: deque[tuple[float, int]] = deque(maxlen=span)
        self._count = 0
        self._start = self._mark = clock()
        self._validation_began: float | None = None
        self._validations, self._validation_seconds = 0, 0.0

    def step(self, tokens: int) -> None:
        """Takes the end of an optimizer step; the time since the last one is its own, but for validations."""
        now = self._clock()
        if self._count == 1:
            self._steps.clear()  # the first one, which starts workers, compiles and fills caches
        self._count += 1
        self._steps.append((now - self._mark, tokens))
        self._mark = now

    def forget(self) -> None:
        """Drops the steps so far: those to come are of another kind."""
        self._steps.clear()

    def begin_validation(self) -> None:
        """Takes the beginning of a validation."""
        self._validation_began = self._clock()

    def end_validation(self) -> float:
        """Takes the end of a validation and returns its seconds."""
        assert self._validation_began is not None
        seconds = self._clock() - self._validation_began
        self._validation_began = None
        self._mark += seconds
        self._validations += 1
        self._validation_seconds += seconds
        return seconds

    @property
    def elapsed(self) -> float:
        """Seconds since the beginning."""
        return self._clock() - self._start

    @property
    def seconds_per_step(self) -> float | None:
        """Mean over the last steps; None before the first."""
        return sum(seconds for seconds, _ in self._steps) / len(self._steps) if self._steps else None

    @property
    def tokens_per_second(self) -> float | None:
        """Over the last steps; None before the first."""
        seconds = sum(seconds for seconds, _ in self._steps)
        return sum(tokens for _, tokens in self._steps) / seconds if seconds else None

    def left(self, steps: float, validations: int, limit: float | None = None) -> Left | None:
        """Returns what remains if it goes on like this.

        Args:
            steps: optimizer steps to go; may be infinite.
            validations: those to go, the running one included.
            limit: seconds after which the fit is ended in any case.

        Returns:
            None where nothing is known.
        """
        per_step, whole = self.seconds_per_step, True
        seconds = math.inf if per_step is None else steps * per_step
        if validations and self._validations:
            mean = self._validation_seconds / self._validations
            running = 0.0 if self._validation_began is None else self._clock() - self._validation_began
            seconds += validations * mean - min(mean, running)
        elif validations:
            whole = False
        if limit is not None and limit <= seconds:
            seconds, whole = max(0.0, limit), True
        return None if math.isinf(seconds) else Left(seconds, whole)


class Schedule:
    """How many optimizer steps and validations a fit has, read off a trainer whose training has begun."""

    def __init__(self, trainer: Trainer) -> None:
        self.total = trainer.estimated_stepping_batches
        """Optimizer steps of the whole fit, infinite where only time ends it."""
        self._per_epoch = trainer.num_training_batches
        self._accumulate = trainer.accumulate_grad_batches
        self._epochs: int | None = trainer.check_val_every_n_epoch
        every = trainer.val_check_batch if trainer.enable_validation else math.inf  # type: ignore[attr-defined]
        self._every = math.inf if every is None else every
        self.counted = every is not None
        """False where validations go by the clock, which says nothing of how many there will be."""

    def validations_after(self, step: int) -> int:
        """Counts the validations that come after so many optimizer steps."""
        return 0 if math.isinf(self.total) else self._validations(int(self.total)) - self._validations(step)

    def _validations(self, step: int) -> int:
        per_epoch, batches = self._per_epoch, self._batches(step)
        if self._epochs is None:
            return int(batches // self._every)
        epochs, batches = divmod(batches, per_epoch)
        running = (epochs + 1) % self._epochs == 0
        return int(epochs // self._epochs * (per_epoch // self._every) + running * (batches // self._every))

    def _batches(self, step: int) -> float:
        epochs, steps = divmod(step, math.ceil(self._per_epoch / self._accumulate))
        return epochs * self._per_epoch + min(steps * self._accumulate, self._per_epoch)


def time_limit(trainer: Trainer) -> float | None:
    """Returns the seconds that `max_time` leaves; None without such a limit."""
    timers = [callback for callback in trainer.callbacks if isinstance(callback, Timer)]  # type: ignore[attr-defined]
    left = [seconds for timer in timers if (seconds := timer.time_remaining()) is not None]
    return min(left, default=None)
