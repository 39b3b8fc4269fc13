"""The files of `<run>/routing/` that tell of the routing: CSV with a header, each written whole or not at all.

`summary.csv` and `gates.csv` keep every step; of `use.csv`, which has a line per task, layer and expert, every split
keeps its last step, and so do `clusters.csv` and `confidence.csv`, which name none.
"""

import csv
import io
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moe_peft.routing.numbers import Asked, Finding, LayerUse, confidence_bins, overall
from moe_peft.writing import write_text

ALL = "all"
"""The layer of a line about all of them; also that of a routing which is one for all."""
USE = ("step", "split", "task", "layer", "expert", "weight", "chosen", "tokens")
SUMMARY = ("step", "split", "layer", "entropy", "mutual_information", "dead", "collapsed")
GATES = ("step", "layer", "omega", "magnitude")
CLUSTERS = ("split", "task", "cluster", "rows", "share")
CONFIDENCE = ("split", "task", "low", "high", "rows", "right")
EMBEDDING = ("name", "kind", "x", "y", "x_share", "y_share")
STEPPED = {"use.csv": USE, "summary.csv": SUMMARY, "gates.csv": GATES}

Row = Sequence[Any]
Uses = Mapping[str, LayerUse]


def put(path: Path, header: Sequence[str], rows: Sequence[Row], gone: Callable[[Row], bool]) -> None:
    """Adds rows to a file, or makes it, and drops some of those that it has; a file of other columns is replaced."""
    kept: list[Row] = []
    if path.is_file():
        with path.open(newline="", encoding="utf-8") as file:
            lines = csv.reader(file)
            if next(lines, None) == list(header):
                kept = [row for row in lines if not gone(row)]
    elif not rows:
        return
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *kept, *rows])
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text.getvalue())


def known(folder: Path, split: str) -> bool:
    """Whether the use of experts by a split's rows was written."""
    path = folder / "use.csv"
    if not path.is_file():
        return False
    with path.open(newline="", encoding="utf-8") as file:
        return any(row["split"] == split for row in csv.DictReader(file))


def forget_after(folder: Path, step: int) -> None:
    """Drops what an interrupted fit wrote after the step that another one goes on from; -1 drops all."""
    for name, header in STEPPED.items():
        put(folder / name, header, [], lambda row: int(row[0]) > step)


def write_use(folder: Path, step: int, split: str, tasks: Sequence[str], uses: Uses) -> None:
    """Writes who used which expert, in place of what the split had."""
    rows = []
    for layer, use in uses.items():
        weights, chosen, tokens = use.weight.tolist(), use.chosen.tolist(), use.tokens.tolist()
        for task, name in enumerate(tasks):
            pairs = zip(use.experts, weights[task], chosen[task], strict=True)
            rows += [
                (step, split, name, layer, expert, f"{weight:.6f}", f"{share:.6f}", tokens[task])
                for expert, weight, share in pairs
                if tokens[task]
            ]
    put(folder / "use.csv", USE, rows, lambda row: row[1] == split)


def summary_rows(step: int, split: str, uses: Uses) -> list[Row]:
    """Returns a line per layer, and one for all of them."""

    def row(layer: str, entropy: float, information: float, dead: int, collapsed: int) -> Row:
        return step, split, layer, f"{entropy:.6f}", f"{information:.6f}", dead, collapsed

    rows = [
        row(layer, use.entropy, use.mutual_information, len(use.dead), int(use.collapsed is not None))
        for layer, use in uses.items()
    ]
    return rows if ALL in uses else [*rows, row(ALL, *overall(uses))]


def write_summary(folder: Path, rows: Sequence[Row]) -> None:
    """Adds lines of `summary_rows`; those of the same step and split are replaced."""
    new = {(str(row[0]), row[1]) for row in rows}
    put(folder / "summary.csv", SUMMARY, rows, lambda row: (row[0], row[1]) in new)


def write_gates(folder: Path, step: int, gates: Mapping[str, tuple[float, float]]) -> None:
    """Adds the gates of a step."""
    rows = [(step, layer, f"{omega:.6f}", f"{magnitude:.6f}") for layer, (omega, magnitude) in gates.items()]
    if rows:
        put(folder / "gates.csv", GATES, rows, lambda row: row[0] == str(step))


def write_findings(folder: Path, found: Sequence[Finding]) -> None:
    """Writes what is wrong with the routing."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps([each._asdict() for each in found], indent=2, ensure_ascii=False)
    write_text(folder / "findings.json", text + "\n")


def write_clusters(
    folder: Path, split: str, tasks: Sequence[str], clusters: int, rows: Counter[tuple[int, int]]
) -> None:
    """Writes how many of each task's rows are most similar to which cluster."""
    totals = Counter({task: 0 for task in range(len(tasks))})
    for (task, _), count in rows.items():
        totals[task] += count
    lines = [
        (split, name, cluster, rows[task, cluster], f"{rows[task, cluster] / totals[task]:.6f}")
        for task, name in enumerate(tasks)
        for cluster in range(clusters)
        if totals[task]
    ]
    if lines:
        put(folder / "clusters.csv", CLUSTERS, lines, lambda row: row[0] == split)


def write_confidence(folder: Path, split: str, tasks: Sequence[str], rows: Sequence[Asked]) -> None:
    """Writes how sure the router was of each task's rows, and how many of them reached their own expert."""
    lines = [
        (split, tasks[task], f"{low:.6g}", f"{high:.6g}", count, right)
        for task, low, high, count, right in confidence_bins(rows, len(tasks))
    ]
    if lines:
        put(folder / "confidence.csv", CONFIDENCE, lines, lambda row: row[0] == split)


def write_map(folder: Path, names: Sequence[tuple[str, str]], points: np.ndarray, share: np.ndarray) -> None:
    """Writes where tasks and clusters lie on a plane, and the share of the variance that each axis shows."""
    shares = [f"{axis:.6f}" for axis in share]
    rows = [(*name, f"{x:.6g}", f"{y:.6g}", *shares) for name, (x, y) in zip(names, points.tolist(), strict=True)]
    put(folder / "embedding.csv", EMBEDDING, rows, lambda row: True)
