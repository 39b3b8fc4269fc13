"""Pictures of what a run scored, and how it got there."""

from collections.abc import Mapping, Sequence
from typing import Any

from moe_peft.reporting.drawing import Picture, Sheet, gutter, short
from moe_peft.reporting.run import Run
from moe_peft.reporting.theme import INK, MUTED, PAPER, SERIES, line_of

ROWS = {"majority": "majority class", "base": "untouched base", "model": "model"}
GAIN = "; a filled dot right of the hollow one, by more than the bars are long, is a gain over the untouched base"
COLUMNS = 3


def scores(results: Mapping[str, Any]) -> Picture:
    """Draws every task's score of the base, of the majority class and of the model, with a standard error."""
    rows = {name: results["rows"].get(name) for name in ROWS}
    known = {name: row for name, row in rows.items() if isinstance(row, dict)}
    tasks = list(known["model"]["tasks"])
    lines: list[tuple] = [
        (name, task, own["metric"], own["value"], own["stderr"], own["n"])
        for name, row in known.items()
        for task, own in row["tasks"].items()
    ]
    lines += [
        (name, "mean", "", row["mean"], row["stderr"], "")
        for name, row in known.items()
        if isinstance(row.get("mean"), float)
    ]
    left = gutter([*tasks, "mean"])
    sheet = Sheet(7.0, 0.45 + 0.27 * (len(tasks) + 1) + 0.45)
    axes = sheet.axes(left, 0.35, 6.75 - left, 0.27 * (len(tasks) + 1))
    places = [*tasks, "mean"]
    for name, task, _, value, error, _ in lines:
        place = places.index(task)
        if name == "majority":
            axes.plot(100 * value, place, "|", color=MUTED, markersize=10, markeredgewidth=1.5)
            continue
        color, fill, lane = (MUTED, PAPER, -0.16) if name == "base" else (SERIES[0], SERIES[0], 0.16)
        axes.errorbar(100 * value, place + lane, xerr=100 * error, color=color, linewidth=1.1)
        axes.plot(100 * value, place + lane, "o", color=color, markerfacecolor=fill, markersize=5)
    axes.set_ylim(len(places) - 0.5, -0.5)
    axes.axhline(len(tasks) - 0.5, color=MUTED, linewidth=0.6)
    axes.set_yticks(range(len(places)), [short(place) for place in places], color=INK)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("points (100 is perfect)")
    axes.grid(axis="x")
    method = results.get("method", "model")
    _score_legend(sheet, left, [*known], method)
    return sheet.picture(
        "scores",
        "Scores",
        f"Filled dots are {method}, with one standard error{GAIN if 'base' in known else ''}.",
        f"Dot plot of {len(tasks)} tasks: {', '.join(method if name == 'model' else ROWS[name] for name in known)}.",
        ["row", "task", "metric", "value", "stderr", "rows"],
        lines,
    )


def _score_legend(sheet: Sheet, left: float, names: Sequence[str], method: str) -> None:
    from matplotlib.lines import Line2D

    marks = {"majority": ("|", MUTED, MUTED), "base": ("o", MUTED, PAPER), "model": ("o", SERIES[0], SERIES[0])}
    for name in names:
        marker, color, fill = marks[name]
        x, y = [(left + 0.06) / sheet.width], [1 - 0.13 / sheet.height]
        sheet.figure.add_artist(
            Line2D(x, y, marker=marker, color=color, markerfacecolor=fill, markersize=5.5, linestyle="none")
        )
        label = short(method) if name == "model" else ROWS[name]
        sheet.text(left + 0.16, 0.13, label, color=MUTED)
        left += 0.16 + 0.066 * len(label) + 0.25


def losses(run: Run) -> Picture | None:
    """Draws the training loss, on the whole and of every task."""
    return _curves(
        run,
        {"all tasks": "train/loss"} | {task: f"train/{task}/loss" for task in run.tasks},
        "losses",
        "Training loss",
        "The loss of training rows, of all tasks and of each. A task whose loss stays where it was while the others "
        "fall is drowned by them or too hard; one that falls to nothing is learned by heart.",
    )


def learning_curves(run: Run) -> Picture | None:
    """Draws every task's validation metric over the steps, and their mean."""
    primary = {task: score["metric"] for task, score in run.scores.items()}
    own = {
        f"{task}, {metric}": f"val/{task}/{metric}"
        for task, metric in run.curves
        if primary.get(task, metric) == metric
    }
    return _curves(
        run,
        {"mean of tasks": "val/mean"} | own,
        "learning_curves",
        "Validation",
        "Each task's own metric on its validation rows, and the mean. A curve that still rises at the end wants more "
        "steps; one that falls while the others rise is a task that the others push aside.",
    )


def _curves(run: Run, names: Mapping[str, str], stem: str, title: str, caption: str) -> Picture | None:
    """Draws numbers of metrics.csv, a panel each, by the titles of the panels; None where it has none of them."""
    found = {panel: [(own.step, own.value) for own in run.history(name)] for panel, name in names.items()}
    found = {panel: points for panel, points in found.items() if points}
    if not found:
        return None
    sheet = panels([short(panel, 30) for panel in found], [{"": points} for points in found.values()])
    rows = [(panel, *point) for panel, points in found.items() for point in points]
    alt = f"{len(found)} line charts over training steps: {', '.join(found)}."
    return sheet.picture(stem, title, caption, alt, ["curve", "step", "value"], rows)


def panels(
    titles: Sequence[str],
    contents: Sequence[Mapping[str, Sequence[tuple]]],
    names: Sequence[str] = ("",),
    above: float = 0.0,
) -> Sheet:
    """Draws small charts over steps, three in a line, of the same curves each.

    Args:
        titles: of the charts.
        contents: of each chart, points by curve: step and value, and lowest and highest value where there is a band.
        names: the curves, which have the same colour in all charts.
        above: inches to leave free above.
    """
    columns = min(COLUMNS, len(titles))
    lines = -(-len(titles) // columns)
    sheet = Sheet(0.15 + 2.35 * (COLUMNS if above else columns), above + 1.75 * lines + 0.1)
    last = max(point[0] for curves in contents for points in curves.values() for point in points)
    for at, (title, curves) in enumerate(zip(titles, contents, strict=True)):
        axes = sheet.axes(0.45 + 2.35 * (at % columns), above + 0.35 + 1.75 * (at // columns), 1.9, 1.0)
        axes.set_title(title)
        for name, points in curves.items():
            color, style = line_of(names.index(name))
            steps, values = [point[0] for point in points], [point[1] for point in points]
            axes.plot(steps, values, style, color=color, marker="o", markersize=3.2 if len(steps) < 15 else 0)
            if len(points[0]) > 2:
                low, high = [point[2] for point in points], [point[3] for point in points]
                axes.fill_between(steps, low, high, color=color, alpha=0.15, linewidth=0)
        axes.set_xlim(-0.03 * last, 1.03 * max(1, last))
        axes.locator_params(axis="y", nbins=4)
        axes.locator_params(axis="x", nbins=4, integer=True)
        axes.grid(axis="y")
        if at + columns >= len(titles):
            axes.set_xlabel("step")
    return sheet
