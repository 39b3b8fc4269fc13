"""Pictures of a router for whole rows: where it sends each task, and how sure it is."""

from collections.abc import Sequence

import numpy as np

from moe_peft.reporting.drawing import Picture, Sheet, key, matrix, short
from moe_peft.reporting.records import Confidence, of_best_split
from moe_peft.reporting.theme import SERIES


def row_shares(tasks: Sequence[str], columns: Sequence[str], percent: np.ndarray) -> Sheet:
    """Draws percentages of each task's rows."""
    sheet, left = matrix(tasks, columns, percent, 100.0, 0.7, ".0f")
    key(sheet, left, sheet.height - 0.3, {0.0: "0", 50.0: "50", 100.0: "100"}, 100.0, "% of the task's rows", 0.7)
    return sheet


def confusion(lines: Sequence[Sequence[str]]) -> Picture:
    """Draws which expert the rows of each task reached.

    Args:
        lines: the confusion table, its header first: a task, then rows by expert.
    """
    header, *body = lines
    experts, tasks = list(header[1:]), [line[0] for line in body]
    counts = np.array([[float(cell) for cell in line[1 : len(header)]] for line in body]).reshape(len(tasks), -1)
    rows = counts.sum(1, keepdims=True)
    percent = 100 * np.divide(counts, rows, out=np.full_like(counts, np.nan), where=rows > 0)
    sheet = row_shares(tasks, experts, percent)
    right = sum(counts[t, experts.index(task)] for t, task in enumerate(tasks) if task in experts)
    reached = 100 * right / max(1.0, counts.sum())
    return sheet.picture(
        "router_confusion",
        "Where the router sends each task's rows",
        f"Percent of each task's rows by the expert that they reached; {reached:.1f}% reached their own. All that "
        "is off the diagonal was answered by another task's expert.",
        f"Heat map of {len(tasks)} tasks by {len(experts)} experts: share of rows.",
        ["task", "expert", "rows", "share"],
        [
            (task, expert, counts[t, e], percent[t, e] / 100)
            for t, task in enumerate(tasks)
            for e, expert in enumerate(experts)
        ],
    )


def confidence(records: Sequence[Confidence]) -> Picture:
    """Draws how sure the router was, over all rows and for each task, and where it was right."""
    own = of_best_split(list(records))
    tasks = list(dict.fromkeys(row.task for row in own))
    panels: list[tuple[str, list[Confidence]]] = [(task, [row for row in own if row.task == task]) for task in tasks]
    edges = min(row.low for row in own), max(row.high for row in own)
    columns = min(4, len(panels) + 1)
    lines = -(-(len(panels) + 1) // columns)
    sheet = Sheet(0.5 + 1.75 * columns, 0.35 + 1.45 * lines + 0.15)
    for at, (title, rows) in enumerate([("all tasks", own), *panels]):
        axes = sheet.axes(0.45 + 1.75 * (at % columns), 0.6 + 1.45 * (at // columns), 1.4, 0.85)
        axes.set_title(short(title, 22))
        for bins, color, bottom in _bars(rows):
            low, high, count = zip(*bins, strict=True)
            widths = [0.9 * (b - a) for a, b in zip(low, high, strict=True)]
            axes.bar(low, count, widths, bottom, color=color, align="edge")
        axes.set_xlim(edges)
        axes.locator_params(axis="x", nbins=3)
        axes.locator_params(axis="y", nbins=3, integer=True)
    sheet.legend(0.45, 0.12, ["right expert", "another expert"], [SERIES[0], SERIES[1]])
    return sheet.picture(
        "router_confidence",
        "How sure the router was",
        f"Rows ({own[0].split}) by how sure the router was of its choice, surer to the right. Mistakes should lie on "
        "the left: where they pile up on the right, the router is sure and wrong, and no threshold can catch them.",
        f"Histograms of router confidence for {len(tasks)} tasks, right and wrong rows apart.",
        Confidence._fields,
        own,
    )


def _bars(rows: Sequence[Confidence]) -> list[tuple[list[tuple[float, float, float]], str, list[float]]]:
    """The right rows of each bin, and on top of them the wrong ones."""
    bins: dict[tuple[float, float], list[float]] = {}
    for row in rows:
        both = bins.setdefault((row.low, row.high), [0.0, 0.0])
        both[0] += row.right
        both[1] += row.rows - row.right
    ordered = sorted(bins.items())
    right = [both[0] for _, both in ordered]
    return [
        ([(*edges, both[0]) for edges, both in ordered], SERIES[0], [0.0] * len(ordered)),
        ([(*edges, both[1]) for edges, both in ordered], SERIES[1], right),
    ]
