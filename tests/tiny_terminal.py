"""A pseudo-terminal as standard output, and what would be seen on it."""

import os
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

import pytest

SEQUENCE = re.compile(r"\x1b\[([\d;?]*)([A-Za-z])")


def seen(text: str, width: int = 1000) -> list[str]:
    """The lines that a terminal shows of a text: it knows new lines, returns, going up, erasing a line, colours."""
    lines, row, column, at = [""], 0, 0, 0
    while at < len(text):
        found = SEQUENCE.match(text, at)
        if found:
            argument, letter = found.groups()
            if letter == "A":
                row -= int(argument or 1)
                assert row >= 0, "above the first line"
            elif letter == "K":
                assert argument == "2"
                lines[row] = ""
            else:
                assert letter == "m", found.group()
            at = found.end()
            continue
        if text[at] == "\n":
            row, column = row + 1, 0
        elif text[at] == "\r":
            column = 0
        else:
            if column == width:
                row, column = row + 1, 0
                lines += [""] * (row + 1 - len(lines))
            lines[row] = lines[row].ljust(column)[:column] + text[at] + lines[row][column + 1 :]
            column += 1
        lines += [""] * (row + 1 - len(lines))
        at += 1
    return [line.rstrip() for line in lines]


class Terminal:
    """What was written to it."""

    def __init__(self) -> None:
        self.raw = ""

    @property
    def lines(self) -> list[str]:
        """What is on the screen and above it."""
        return seen(self.raw)


@contextmanager
def terminal(monkeypatch: pytest.MonkeyPatch, columns: int = 80, errors: TextIO | None = None) -> Iterator[Terminal]:
    """Within: stdout is a terminal of so many columns, and so is stderr if it is no other stream.

    Afterwards the yielded object has its text.
    """
    own, other = os.openpty()
    made, parts = Terminal(), []

    def read() -> None:
        try:
            while part := os.read(own, 65536):
                parts.append(part)
        except OSError:  # the other end is closed
            pass

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    with monkeypatch.context() as patch, open(other, "w", encoding="utf-8") as stream:
        patch.setenv("COLUMNS", str(columns))
        patch.setenv("TERM", "xterm-256color")
        patch.setattr(sys, "stdout", stream)
        patch.setattr(sys, "stderr", errors or stream)
        try:
            yield made
        finally:
            assert sys.stdout is stream and sys.stderr is (errors or stream), "not given back"
    reader.join(10)
    os.close(own)
    made.raw = b"".join(parts).decode().replace("\r\n", "\n")
