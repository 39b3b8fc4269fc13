"""A bar at the bottom of a terminal, redrawn in place; whatever is printed or logged meanwhile goes above it.

No thread redraws it: it changes when a batch has ended, and loader processes are forked while nothing holds a lock.
"""

import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import TextIO

from rich.cells import cell_len, set_cell_size
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from moe_peft.callbacks.readings import Evaluation, Reading, number

NARROWEST, WIDEST = 10, 40
"""Columns of the bar itself; numbers give way to it, the less important ones first."""
TASK_LINES = 7


class Screen(Console):
    """A terminal whose cursor stays: a process that is killed could not bring it back."""

    def show_cursor(self, show: bool = True) -> bool:
        """Leaves it as it is."""
        return False


class Bar:
    """Draws where a fit is, its loss, its tasks' losses, and a second bar for the evaluation within it.

    Args:
        every: seconds between two drawings.
        clock: a clock in seconds.
    """

    def __init__(self, every: float = 0.2, clock: Callable[[], float] = time.monotonic) -> None:
        self.every, self._clock = every, clock
        self._drawn = 0.0
        self._live: Live | None = None
        self._moved: list[tuple[TextIO, TextIO]] = []
        """Streams and what stands in for them."""

    @staticmethod
    def suits(stream: TextIO) -> bool:
        """Whether a stream is a terminal on which a line can be drawn anew."""
        return stream.isatty() and os.environ.get("TERM", "").lower() not in ("dumb", "unknown")

    def due(self, step: int | None) -> bool:
        """Some times a second."""
        return self._clock() - self._drawn >= self.every

    def show(self, reading: Reading | None, evaluation: Evaluation | None) -> None:
        """Draws it."""
        live = self._live or self._start()
        live.update(Group(*drawing(reading, evaluation, live.console.width)), refresh=True)
        self._drawn = self._clock()

    def say(self, line: str, reading: Reading) -> None:
        """Prints a line above the bar."""
        self.show(reading, None)
        print(line)

    def end(self, reading: Reading | None = None, evaluation: Evaluation | None = None) -> None:
        """Leaves what was drawn last, or the end that is given, above the next line."""
        if reading is not None or evaluation is not None:
            self.show(reading, evaluation)
        if self._live is None:
            return
        live, self._live = self._live, None
        sys.stdout.flush()  # half a line that somebody has printed
        sys.stderr.flush()
        live.stop()
        for own, other in self._moved:
            redirect_logs(other, own)

    def _start(self) -> Live:
        console = Screen(force_terminal=True, markup=False, highlight=False, emoji=False, soft_wrap=True)
        streams = sys.stdout, sys.stderr
        # A stderr that goes to a file is left to go there.
        self._live = Live(console=console, auto_refresh=False, redirect_stderr=sys.stderr.isatty())
        self._live.start()
        self._moved = list(zip(streams, (sys.stdout, sys.stderr), strict=True))
        for own, other in self._moved:
            redirect_logs(own, other)
        return self._live


def redirect_logs(source: TextIO, target: TextIO) -> None:
    """Has log handlers that write to one stream write to another: they hold on to the one they were made with."""
    for handler in log_handlers():
        if isinstance(handler, logging.StreamHandler) and handler.stream is source:
            handler.setStream(target)


def log_handlers() -> Iterator[logging.Handler]:
    """Goes through the handlers of all loggers."""
    for logger in (logging.root, *logging.root.manager.loggerDict.values()):
        yield from getattr(logger, "handlers", ())


def drawing(reading: Reading | None, evaluation: Evaluation | None, width: int) -> Iterator[RenderableType]:
    """Gives the lines of a fit, then those of an evaluation, none wider than a width."""
    if reading is not None:
        label = f"fit ({reading.stage})" if reading.stage else "fit"
        yield bar(label, reading.step, reading.total, [reading.place, *reading.speed, reading.time], width)
        if reading.loss is not None:
            told = [("loss", number(reading.loss)), *((name, number(loss)) for name, loss in reading.tasks.items())]
            yield from cells([f"{name} {value}" for name, value in told], width)
    if evaluation is not None:
        place = f"{evaluation.done}/{evaluation.total}"
        yield bar(evaluation.name, evaluation.done, evaluation.total, [place, evaluation.time], width)


def bar(label: str, done: int, total: float, told: list[str], width: int) -> Table:
    """Gives a bar between its label and what is told of it, of which the place and the time stay longest."""
    told = [part for part in told if part]

    def room() -> int:
        return width - len(label) - len("  ".join(told)) - 3

    while room() < NARROWEST and len(told) > 1:
        told.pop(-2 if len(told) > 2 else -1)
    line = Table.grid(padding=(0, 1))
    line.add_row(
        Text(label),
        ProgressBar(total, done, width=max(1, min(WIDEST, room()))) if total < float("inf") else Text("..."),
        Text("  ".join(told)),
    )
    return line


def cells(told: list[str], width: int) -> list[Text]:
    """Puts numbers side by side; in columns where they need several lines, of which only so many are shown."""
    if cell_len("  ".join(told)) <= width:
        return [Text("  ".join(told))]
    column = max(map(cell_len, told)) + 2
    per_line = max(1, (width + 2) // column)
    most = per_line * TASK_LINES
    if len(told) > most:
        told = [*told[: most - 1], f"({len(told) - most + 1} more)"]
    lines = [told[at : at + per_line] for at in range(0, len(told), per_line)]
    padded = ["".join(set_cell_size(part, column) for part in line).rstrip() for line in lines]
    return [Text(line if cell_len(line) <= width else set_cell_size(line, width)) for line in padded]
