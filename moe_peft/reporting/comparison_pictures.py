"""Pictures of several runs: scores beside each other, curves on top of each other."""

from collections.abc import Callable, Sequence

from moe_peft.reporting.comparison import Contestant, references
from moe_peft.reporting.drawing import Picture, Sheet, gutter, short
from moe_peft.reporting.experts import MEASURES
from moe_peft.reporting.records import Summary
from moe_peft.reporting.routing import ALL
from moe_peft.reporting.run import Run
from moe_peft.reporting.theme import INK, MUTED, line_of
from moe_peft.reporting.training import panels

Points = list[tuple[int, float, float, float]]


def scores(found: Sequence[Contestant], tasks: Sequence[str]) -> Picture | None:
    """Draws every contestant's score by task: the mean, its spread and the single seeds."""
    scored = [one for one in found if one.finished]
    if not scored:
        return None
    places = [*tasks, "mean"]
    lane = 0.14
    line = lane * len(scored) + 0.14
    left = gutter(places)
    above = 0.14 + 0.19 * len(scored)
    sheet = Sheet(7.0, above + line * len(places) + 0.55)
    axes = sheet.axes(left, above, 6.75 - left, line * len(places))
    rows: list[tuple] = []
    for at, one in enumerate(scored):
        color, _ = line_of(found.index(one))
        sheet.legend(left, 0.1 + 0.19 * at, [short(one.label, 90)], [color])
        for place, task in enumerate(places):
            own = one.mean() if task == "mean" else one.score(task)
            assert own is not None
            height = place + (at - (len(scored) - 1) / 2) * lane / line
            axes.plot([100 * value for value in own.values], [height] * len(own.values), ".", color=color, alpha=0.45)
            axes.errorbar(100 * own.mean, height, xerr=100 * (own.sd or 0), fmt="o", markersize=4.5, color=color)
            rows += [(one.label, task, run.seed, value) for run, value in zip(one.finished, own.values, strict=True)]
    for task, own in references([run for one in found for run in one.runs]).get("base", {}).items():
        if own is not None and task in places:
            axes.plot([100 * own.mean] * 2, [places.index(task) - 0.42, places.index(task) + 0.42], color=MUTED)
    axes.set_ylim(len(places) - 0.5, -0.5)
    axes.set_yticks(range(len(places)), [short(place) for place in places], color=INK)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("points (100 is perfect)")
    axes.grid(axis="x")
    return sheet.picture(
        "compared_scores",
        "Scores",
        "Dots are means over seeds, bars their standard deviation, faint dots the single seeds; the grey stroke is the "
        "untouched base. Bars that overlap are no difference yet.",
        f"Dot plot of {len(tasks)} tasks and {len(scored)} contestants.",
        ["contestant", "task", "seed", "value"],
        rows,
    )


def over_seeds(histories: Sequence[Sequence[tuple[int, float]]]) -> Points:
    """Mean, lowest and highest value of every step that a run has logged."""
    steps: dict[int, list[float]] = {}
    for history in histories:
        for step, value in history:
            steps.setdefault(step, []).append(value)
    return [(step, sum(own) / len(own), min(own), max(own)) for step, own in sorted(steps.items())]


def overlaid(
    found: Sequence[Contestant], charts: dict[str, Callable[[Run], Sequence[tuple[int, float]]]]
) -> tuple[Sheet, list[tuple]] | None:
    """Draws charts with a curve per contestant over its runs; returns the sheet and what was drawn."""
    names = [one.label for one in found]
    drawn: dict[str, dict[str, Points]] = {}
    for title, history in charts.items():
        curves = {one.label: over_seeds([history(run) for run in one.runs]) for one in found}
        if any(curves.values()):
            drawn[title] = {name: curve for name, curve in curves.items() if curve}
    if not drawn:
        return None
    above = 0.14 + 0.19 * len(names)
    sheet = panels([short(title, 30) for title in drawn], list(drawn.values()), names, above)
    for at, name in enumerate(names):
        color, style = line_of(at)
        sheet.legend(0.45, 0.1 + 0.19 * at, [short(name, 90)], [color], [style])
    rows = [
        (title, name, *point) for title, curves in drawn.items() for name, curve in curves.items() for point in curve
    ]
    return sheet, rows


def learning(found: Sequence[Contestant], tasks: Sequence[str]) -> Picture | None:
    """Draws the validation metrics over training."""

    def history(name: str) -> Callable[[Run], Sequence[tuple[int, float]]]:
        return lambda run: [(point.step, point.value) for point in run.history(name)]

    charts = {"training loss": history("train/loss"), "mean of tasks": history("val/mean")}
    metrics = {task: metric for one in found for run in one.runs for task, metric in reversed(run.curves)}
    primary = {task: own["metric"] for one in found for run in one.runs for task, own in run.scores.items()}
    for task in tasks:
        metric = primary.get(task, metrics.get(task, ""))
        charts[f"{task}, {metric}"] = history(f"val/{task}/{metric}")
    made = overlaid(found, charts)
    if made is None:
        return None
    return made[0].picture(
        "compared_curves",
        "Learning curves",
        "Mean over seeds, the band from the lowest to the highest. Look at who is ahead at equal steps, and whether "
        "the order at the end would hold with more of them.",
        f"Line charts over training steps for {len(found)} contestants.",
        ["curve", "contestant", "step", "mean", "low", "high"],
        made[1],
    )


def routers(found: Sequence[Contestant]) -> Picture | None:
    """Draws entropy and mutual information over training."""

    def history(name: str) -> Callable[[Run], Sequence[tuple[int, float]]]:
        return lambda run: [(own.step, getattr(own, name)) for own in during_training(run.summary)]

    made = overlaid(found, {title: history(name) for name, title in MEASURES.items()})
    if made is None:
        return None
    return made[0].picture(
        "compared_routers",
        "Routers",
        "Entropy (1: all experts alike) and mutual information of task and expert (1: the task decides), mean over "
        "layers and seeds. A method whose mutual information stays at 0 gives every task the same mixture.",
        f"Line charts of router entropy and mutual information for {len(found)} contestants.",
        ["measure", "contestant", "step", "mean", "low", "high"],
        made[1],
    )


def during_training(summary: Sequence[Summary]) -> list[Summary]:
    """The means over layers in validation, or where there are none in training."""
    means = [own for own in summary if own.layer == ALL]
    return [own for own in means if own.split == "validation"] or [own for own in means if own.split == "train"]
