"""Pictures of a comparison that hold for any number of rows: differences of the mean, and task by task."""

from collections.abc import Sequence

import numpy as np

from moe_peft.rack.measures import Line
from moe_peft.rack.paired import Paired
from moe_peft.reporting.drawing import Picture, Sheet, gutter, matrix, short
from moe_peft.reporting.theme import INK, MUTED, SERIES

FULL = 10.0
"""Points from which on a cell has the full colour."""


def against_reference(lines: Sequence[Line]) -> list[tuple[str, Paired]]:
    """Tags and paired differences of the rows that have one, the best first."""
    found = [(line.row.tag, line.paired) for line in lines if line.paired is not None]
    return sorted(found, key=lambda own: -own[1].difference)


def differences(lines: Sequence[Line], reference: str) -> Picture | None:
    """Draws the paired differences, the best on top, with two standard errors."""
    found = against_reference(lines)
    if not found:
        return None
    names = [tag for tag, _ in found]
    left = gutter(names)
    sheet = Sheet(7.0, 0.2 + 0.24 * len(found) + 0.55)
    axes = sheet.axes(left, 0.2, 6.75 - left, 0.24 * len(found))
    axes.axvline(0, color=MUTED, linewidth=0.8)
    for place, (_, own) in enumerate(found):
        axes.errorbar(100 * own.difference, place, xerr=200 * own.stderr, fmt="o", markersize=4.5, color=SERIES[0])
    axes.set_ylim(len(found) - 0.5, -0.5)
    axes.set_yticks(range(len(found)), [short(name) for name in names], color=INK)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel(f"points above {reference}")
    axes.grid(axis="x")
    return sheet.picture(
        "compared_differences",
        f"Against {reference}",
        "Paired differences of the mean over tasks, with two standard errors over rows and seeds. A bar that crosses "
        "the line is no difference yet; with few seeds a bar that just clears it may be chance.",
        f"Dot plot of {len(found)} paired differences.",
        ["tag", "difference", "stderr", "seeds"],
        [(tag, own.difference, own.stderr, own.seeds) for tag, own in found],
    )


def by_task(lines: Sequence[Line], reference: str) -> Picture | None:
    """Draws the paired differences of every task as a heat map, the best row on top."""
    found = against_reference(lines)
    if not found:
        return None
    tasks = list(found[0][1].tasks)
    values = 100 * np.array([[own.tasks[task] for task in tasks] for _, own in found])
    sheet, _ = matrix([tag for tag, _ in found], tasks, values, FULL, 1.0, "+.1f")
    return sheet.picture(
        "compared_tasks",
        f"Against {reference}, task by task",
        f"Points above {reference} (blue) or below it (orange), mean over seeds; {FULL:g} have the full colour. Look "
        "for columns: a task on which every row differs from the reference says more of the reference than of them.",
        f"Heat map of paired differences, {len(found)} rows by {len(tasks)} tasks.",
        ["tag", "task", "difference"],
        [(tag, task, own.tasks[task]) for tag, own in found for task in tasks],
    )
