"""What there is to tell of a running fit or evaluation, in words; and line by line, where nothing can be drawn.

The text is plain ASCII: a log file may be read by anything.
"""

import time
from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

from moe_peft.callbacks.pace import Left

FEW = 8
"""So many tasks are told one by one in a line; of more, the lowest and the highest."""


class Reading(NamedTuple):
    """Where a fit is."""

    step: int
    total: float
    stage: str
    """The parameter groups that learn, where a schedule leaves others as they are; else empty."""
    loss: float | None
    """None before the first step."""
    tasks: dict[str, float]
    seconds_per_step: float | None
    tokens_per_second: float | None
    left: Left | None
    elapsed: float

    @property
    def place(self) -> str:
        """The step, and of how many."""
        return f"{self.step}/{self.total}" if isinstance(self.total, int) else str(self.step)

    @property
    def speed(self) -> list[str]:
        """Seconds per step, and tokens per second."""
        if self.seconds_per_step is None:
            return []
        each = self.seconds_per_step
        step = f"{each:.2f} s/step" if each >= 1 else f"{1000 * each:.0f} ms/step"
        return [step] if self.tokens_per_second is None else [step, f"{self.tokens_per_second:,.0f} tokens/s"]

    @property
    def time(self) -> str:
        """What is left; at the end, what it took."""
        if self.step == self.total:
            return f"in {clock(self.elapsed)}"
        return "" if self.left is None else f"{'' if self.left.whole else '>'}{clock(self.left.seconds)} left"

    def line(self) -> str:
        """All of it."""
        assert self.loss is not None
        stage = f" ({self.stage})" if self.stage else ""
        loss = f"loss {number(self.loss)}{among(self.tasks, number)}"
        return "  ".join(part for part in (f"step {self.place}{stage}", loss, *self.speed, self.time) if part)


class Evaluation(NamedTuple):
    """Where a validation, test or prediction is."""

    name: str
    done: int
    total: int
    elapsed: float

    @property
    def time(self) -> str:
        """What is left if the other batches take as long; at the end, what it took."""
        if self.done == self.total:
            return f"in {clock(self.elapsed)}"
        return f"{clock(self.elapsed / self.done * (self.total - self.done))} left" if self.done else ""

    def line(self) -> str:
        """All of it."""
        return "  ".join(part for part in (f"{self.name} {self.done}/{self.total} batches", self.time) if part)


def validation_line(place: str, mean: float | None, scores: Mapping[str, float], seconds: float) -> str:
    """Tells a validation's scores, in points; metrics are fractions."""
    points = "" if mean is None else f" {100 * mean:.1f}"
    tasks = among(scores, lambda value: f"{100 * value:.1f}")
    return f"step {place}  validation{points}{tasks}  in {clock(seconds)}"


def number(value: float) -> str:
    """Three digits that count."""
    return f"{value:#.3g}".rstrip(".") if abs(value) < 1000 else f"{value:,.0f}"


def clock(seconds: float) -> str:
    """Minutes and seconds, with hours where there are any."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def among(tasks: Mapping[str, float], told: Callable[[float], str]) -> str:
    """Tells every task's number in brackets, or the range of many; nothing of a single one, which is the whole."""
    if len(tasks) < 2:
        return ""
    if len(tasks) <= FEW:
        return f" ({', '.join(f'{name} {told(value)}' for name, value in tasks.items())})"
    low, high = min(tasks, key=lambda name: tasks[name]), max(tasks, key=lambda name: tasks[name])
    return f" ({len(tasks)} tasks, {low} {told(tasks[low])} to {high} {told(tasks[high])})"


class View(Protocol):
    """A way to show it."""

    def due(self, step: int | None) -> bool:
        """Whether to show what the end of this step brought, or that of an evaluation's batch (None)."""
        ...

    def show(self, reading: Reading | None, evaluation: Evaluation | None) -> None:
        """Shows where a fit is, an evaluation, or one within the other."""
        ...

    def say(self, line: str, reading: Reading) -> None:
        """Tells something for good, and where the fit is now."""
        ...

    def end(self, reading: Reading | None = None, evaluation: Evaluation | None = None) -> None:
        """Shows the end of it, if there is one to show, and leaves the screen alone; may be called again."""
        ...


class Lines:
    """Prints one line every so many steps, and one now and then where an evaluation takes long.

    Args:
        every_n_steps: optimizer steps between two lines.
        patience: seconds between two lines of an evaluation.
        clock: a clock in seconds.
    """

    def __init__(self, every_n_steps: int, patience: float = 30.0, clock: Callable[[], float] = time.monotonic) -> None:
        self.every_n_steps, self.patience, self._clock = every_n_steps, patience, clock
        self._said, self._step = clock(), -1

    def due(self, step: int | None) -> bool:
        """At multiples of `every_n_steps`, so that a resumed fit tells of the same steps; evaluations by the clock."""
        return self._clock() - self._said >= self.patience if step is None else step % self.every_n_steps == 0

    def show(self, reading: Reading | None, evaluation: Evaluation | None) -> None:
        """Prints a line, never two of a step."""
        if evaluation is not None:
            self._print(evaluation.line() if reading is None else f"step {reading.place}  {evaluation.line()}")
        elif reading is not None and reading.loss is not None and reading.step != self._step:
            self._step = reading.step
            self._print(reading.line())

    def say(self, line: str, reading: Reading) -> None:
        """Prints the line."""
        self._print(line)

    def end(self, reading: Reading | None = None, evaluation: Evaluation | None = None) -> None:
        """Prints the last step; after an evaluation its results say enough."""
        if reading is not None:
            self.show(reading, None)

    def _print(self, line: str) -> None:
        self._said = self._clock()
        print(line, flush=True)
