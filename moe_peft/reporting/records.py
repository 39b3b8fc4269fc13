"""The files of a run folder that hold numbers, each as plain records. All of them may be absent.

A file is read by the names of its columns; columns that are not known here are ignored. A killed process may leave
half a line at the end of a file: it is not read.
"""

import csv
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar


class Metric(NamedTuple):
    """A line of metrics.csv."""

    step: int
    name: str
    value: float


class Use(NamedTuple):
    """How much of a task's routing weight went to an expert of a layer."""

    step: int
    split: str
    task: str
    layer: str
    expert: str
    weight: float
    chosen: float
    """Share of the task's tokens (or rows) of which the expert has the largest weight."""
    tokens: float


class Summary(NamedTuple):
    """What a layer's routing looks like as a whole; the layer `all` is their mean."""

    step: int
    split: str
    layer: str
    entropy: float
    mutual_information: float
    dead: float
    collapsed: float


class Gate(NamedTuple):
    """The two gates of a linear of T-REX; the prior's weight is 1 - omega."""

    step: int
    layer: str
    omega: float
    magnitude: float


class Cluster(NamedTuple):
    """Rows of a task that are nearest to a cluster of the semantic prior."""

    split: str
    task: str
    cluster: str
    rows: float
    share: float


class Rank(NamedTuple):
    """The rank that a task chose for a linear."""

    task: str
    linear: str
    rank: int
    start: int = 0
    """What training began with; 0 where it is not known."""


class Confidence(NamedTuple):
    """Rows of a task whose router was that sure, and how many of them reached the right expert."""

    split: str
    task: str
    low: float
    high: float
    rows: float
    right: float


class Point(NamedTuple):
    """A task or a cluster on the map."""

    name: str
    kind: str
    x: float
    y: float
    x_share: float = math.nan
    """Of the variance, along this axis."""
    y_share: float = math.nan


Record = TypeVar("Record", Metric, Use, Summary, Gate, Cluster, Rank, Confidence, Point)


def read_records(path: Path, kind: type[Record]) -> list[Record]:
    """Reads a file; none where it does not exist.

    Raises:
        ValueError: a column is missing or a value is no number.
    """
    return list(each_record(path, kind))


def each_record(path: Path, kind: type[Record]) -> Iterator[Record]:
    """Reads a file record by record, see `read_records`."""
    lines = each_line(path)
    header = next(lines, None)
    if header is None:
        return
    missing = [name for name in kind._fields if name not in header and name not in kind._field_defaults]
    if missing:
        raise ValueError(f"'{path}' has no column {missing[0]!r}; it has {', '.join(header)}: record it again")
    places = {name: header.index(name) for name in kind._fields if name in header}
    types = kind.__annotations__
    for line in lines:
        try:
            yield kind(**{name: value_of(line[at], types[name]) for name, at in places.items()})
        except ValueError as error:
            raise ValueError(f"'{path}', line {','.join(line)[:80]!r}: {error}; record it again") from None


def each_line(path: Path) -> Iterator[list[str]]:
    """Yields a CSV file's whole lines as cells; none where it does not exist."""
    if not path.is_file():
        return
    with path.open(newline="", encoding="utf-8") as file:
        header: list[str] | None = None
        for line in csv.reader(text for text in file if text.endswith("\n")):
            if header is None:
                header = line
            if len(line) >= len(header):
                yield line


def value_of(text: str, kind: type) -> Any:
    """Reads a cell; an empty one that should be a number is nan."""
    return math.nan if kind is float and not text else kind(text)


def latest(path: Path, kind: type[Record]) -> list[Record]:
    """Reads, of every split that a file knows, the records of its last step."""
    found: dict[str, tuple[int, list[Record]]] = {}
    for record in each_record(path, kind):
        split, step = getattr(record, "split", ""), record.step  # type: ignore[union-attr]
        if split not in found or step > found[split][0]:
            found[split] = (step, [])
        if step == found[split][0]:
            found[split][1].append(record)
    return [record for _, records in found.values() for record in records]


def of_best_split(records: list[Any]) -> list[Any]:
    """Keeps the records of one split: the test's, or else the validation's, or else the training's."""
    order = {"test": 0, "validation": 1, "train": 2}
    best = min({record.split for record in records}, key=lambda split: order.get(split, 3), default="")
    return [record for record in records if record.split == best]
