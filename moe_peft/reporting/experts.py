"""Pictures of what experts did: use per task and layer, entropy and mutual information, dead and collapsed ones."""

from collections.abc import Sequence
from math import log

import numpy as np

from moe_peft.reporting.drawing import (
    GAP,
    KEY,
    LABELS,
    LETTER,
    Picture,
    Sheet,
    gutter,
    heat,
    key,
    label_axis,
    matrix,
    short,
)
from moe_peft.reporting.records import Summary, of_best_split
from moe_peft.reporting.routing import ALL, Grid, Shares, grid
from moe_peft.reporting.theme import INK, MUTED, SERIES, STYLES

OUTLIERS = 0.5
"""Percent of the cells that may be above the full colour, lest a single layer pale all others."""
SPLITS = ("train", "validation", "test")
LITTLE = 0.1
"""Mutual information is often this small: no axis ends below it, so that noise looks like what it is."""
MEASURES = {"entropy": "entropy", "mutual_information": "mutual information"}


def use_by_task(shares: Shares) -> Picture:
    """Draws shares of weight by task and expert, a mean over layers."""
    tasks, experts, values = shares.tasks, shares.experts, shares.by_task
    top, gamma = _scale(values, len(experts))
    sheet, left = matrix(tasks, experts, 100 * values, 100 * top, gamma, ".0f" if top > 0.3 else ".1f")
    _share_key(sheet, left, len(experts), top, gamma)
    layers = "" if shares.layers == [ALL] else f", mean over {len(shares.layers)} layers"
    return sheet.picture(
        "expert_use",
        "Which expert serves which task",
        f"Percent of each task's routing weight that goes to each expert ({shares.source}{layers}). "
        "Rows that differ: the router tells the tasks apart; an empty column: an expert that nobody uses.",
        f"Heat map of {len(tasks)} tasks by {len(experts)} experts: share of routing weight.",
        ["task", "expert", "share"],
        [(task, expert, values[t, e]) for t, task in enumerate(tasks) for e, expert in enumerate(experts)],
    )


def use_by_layer(shares: Shares) -> Picture:
    """Draws shares of weight by task, layer and expert: one panel per task and kind of linear, experts by blocks."""
    tasks, experts = shares.tasks, shares.experts
    layout, (top, gamma) = grid(shares.layers), _scale(shares.values, len(experts), OUTLIERS)
    left = GAP + max(gutter(experts) if len(experts) <= LABELS else 0.35, 0.3)
    wide = min(max(0.046 * len(layout.blocks), LETTER * max(len(short(kind)) for kind in layout.kinds), 0.75), 2.4)
    high = min(max(0.1 * len(experts), 0.5), 2.4)
    width = left + (wide + GAP) * len(layout.kinds) + 0.15
    height = 0.35 + (high + 0.3) * len(tasks) + 0.75
    sheet = Sheet(max(width, left + KEY), height)
    for column, kind in enumerate(layout.kinds):
        sheet.text(left + (wide + GAP) * column, 0.12, short(kind), color=MUTED)
    for t, task in enumerate(tasks):
        above = 0.35 + (high + 0.3) * t
        sheet.text(left, above + 0.06, short(task, 60), fontsize=8.5)
        cube = _cube(layout, shares, t)
        for column in range(len(layout.kinds)):
            axes = sheet.axes(left + (wide + GAP) * column, above + 0.16, wide, high)
            heat(axes, cube[column].T, top, gamma)
            axes.set_yticks([])
            axes.set_xticks([])
            if column == 0:
                label_axis(axes.yaxis, experts, fontsize=6.5)
            if t == len(tasks) - 1:
                label_axis(axes.xaxis, [str(block) for block in layout.blocks], most=4, fontsize=7)
    sheet.text(left, height - 0.5, "block of the backbone →", color=MUTED, fontsize=7.5)
    _share_key(sheet, left, len(experts), top, gamma, clipped=bool(np.nanmax(shares.values) > top))
    return sheet.picture(
        "expert_use_by_layer",
        "The same, layer by layer",
        f"Each panel is one task (rows) and one kind of linear (columns); within it experts from top to bottom, blocks "
        f"of the backbone from left to right ({shares.source}). Look for horizontal streaks, an "
        "expert that a task keeps through the depth, and for panels of a column that differ from task to task.",
        f"{len(tasks)} by {len(layout.kinds)} small heat maps of experts by blocks: share of routing weight.",
        ["task", "layer", "expert", "share"],
        [
            (task, layer, expert, shares.values[t, at, e])
            for t, task in enumerate(tasks)
            for at, layer in enumerate(shares.layers)
            for e, expert in enumerate(experts)
        ],
    )


def _cube(layout: Grid, shares: Shares, task: int) -> np.ndarray:
    """[K, B, E] one task's shares on the grid."""
    cube = np.full((len(layout.kinds), len(layout.blocks), len(shares.experts)), np.nan)
    for at, layer in enumerate(shares.layers):
        cube[layout.place[layer]] = shares.values[task, at]
    return cube


def _scale(values: np.ndarray, experts: int, outliers: float = 0.0) -> tuple[float, float]:
    """The share of the full colour and the exponent of the others, that an even share has a third of it, or a half.

    The full colour is the largest share but for outliers, and at least twice what an even router gives.
    """
    top = min(1.0, max(2 / experts, float(np.nanpercentile(values, 100 - outliers))))
    return top, min(1.0, log(1 / 3) / log(1 / (experts * top))) if experts * top > 1 else 1.0


def _share_key(sheet: Sheet, left: float, experts: int, top: float, gamma: float, clipped: bool = False) -> None:
    def percent(value: float) -> str:
        return f"{100 * value:.0f}" if value >= 0.1 else f"{100 * value:.2g}"

    even, full = 1 / experts, f"{percent(top)}{' or more' if clipped else ''}"
    marks = {0.0: "0", even: f"even {percent(even)}", top: full} if even < top else {0.0: "0", top: full}
    key(sheet, left, sheet.height - 0.3, marks, top, "% of the task's weight", gamma)


def router_history(summary: Sequence[Summary]) -> Picture | None:
    """Draws entropy and mutual information over training, a line per split and a band over the layers."""
    splits = [split for split in SPLITS if any(own.split == split for own in summary)]
    if not splits:
        return None
    sheet, layers = Sheet(7.0, 2.65), len({own.layer for own in summary} - {ALL})
    banded = "validation" if "validation" in splits else splits[0]
    lines = {split: (SERIES[at], STYLES[at]) for at, split in enumerate(SPLITS)}
    rows: list[tuple] = []
    for panel, (name, title) in enumerate(MEASURES.items()):
        axes = sheet.axes(0.45 + 3.45 * panel, 0.55, 2.95, 1.6)
        axes.set_title(title)
        for split in splits:
            color, style = lines[split]
            points = _over_layers([own for own in summary if own.split == split], name)
            if points:
                steps, mean, low, high = zip(*points, strict=True)
                if split == banded:
                    axes.fill_between(steps, low, high, color=color, alpha=0.15, linewidth=0)
                axes.plot(steps, mean, style, color=color, marker="o", markersize=4 if len(steps) < 20 else 0)
                rows += [(name, split, *point) for point in points]
        top = 1.0 if name == "entropy" else max([LITTLE, *(row[-1] for row in rows if row[0] == name)])
        axes.set_ylim(-0.03 * top, 1.03 * top)
        axes.locator_params(axis="x", nbins=6, integer=True)
        axes.set_xlabel("step")
        axes.grid(axis="y")
    colors, styles = zip(*(lines[split] for split in splits), strict=True)
    sheet.legend(0.45, 0.12, splits, colors, styles)
    band = f"; the band holds all {layers} layers in {banded}" if layers > 1 else ""
    return sheet.picture(
        "router_history",
        "How decided the router is, and how much it depends on the task",
        f"Both lie between 0 and 1{band}. Entropy 1: a token's weight is spread over all experts, 0: one has it all; "
        "mutual information 0: all tasks are routed alike, 1: the task decides. A router that learns its tasks rises "
        "on the right; one that collapses falls on the left and stays flat on the right.",
        "Line charts of router entropy and task-expert mutual information over training steps.",
        ["measure", "split", "step", "mean", "low", "high"],
        rows,
    )


def _over_layers(summary: Sequence[Summary], name: str) -> list[tuple[int, float, float, float]]:
    """Step, mean (as recorded), lowest and highest layer of every step."""
    steps: dict[int, dict[str, float]] = {}
    for own in summary:
        steps.setdefault(own.step, {})[own.layer] = getattr(own, name)
    points = []
    for step, layers in sorted(steps.items()):
        single = [value for layer, value in layers.items() if layer != ALL] or [*layers.values()]
        points.append((step, layers.get(ALL, float(np.mean(single))), min(single), max(single)))
    return points


def layers_at_a_glance(summary: Sequence[Summary]) -> Picture | None:
    """Draws entropy, mutual information and dead experts of every layer; None where there is but one router."""
    own = of_best_split([record for record in summary if record.layer != ALL])
    step = max((record.step for record in own), default=0)
    own = [record for record in own if record.step == step]
    if len(own) < 2:
        return None
    layout = grid([record.layer for record in own])
    left, wide, high = gutter(layout.kinds), max(0.17 * len(layout.blocks), 2.4), 0.19 * len(layout.kinds)
    dead = max(record.dead for record in own)
    entropies, information = [record.entropy for record in own], [record.mutual_information for record in own]
    most = max(LITTLE, *information)
    measures = [
        ("entropy", f"entropy, {min(entropies):.2f} to {max(entropies):.2f} (full colour 1; × collapsed)", 1.0),
        ("mutual_information", f"mutual information, full colour {most:.2f}", most),
        ("dead", f"dead experts, full colour {dead:.0f}", dead),
    ][: 3 if dead else 2]
    count = "the last map counts experts that get nothing" if dead else "no expert is dead"
    sheet = Sheet(left + max(wide + 0.2, KEY), len(measures) * (high + 0.42) + 0.65)
    for panel, (name, title, top) in enumerate(measures):
        axes = sheet.axes(left, 0.3 + (high + 0.42) * panel, wide, high)
        axes.set_title(title)
        values = layout.spread({record.layer: getattr(record, name) for record in own})
        heat(axes, values, top, numbers=".0f" if name == "dead" else None)
        label_axis(axes.yaxis, layout.kinds, most=len(layout.kinds))
        label_axis(axes.xaxis, [str(block) for block in layout.blocks], most=16)
    for record in own:
        if record.collapsed:
            row, column = layout.place[record.layer]
            sheet.figure.axes[0].plot(column, row, "x", color=INK, markersize=5)
    key(sheet, left, sheet.height - 0.3, {0.0: "0", 1.0: "full"}, 1.0)
    return sheet.picture(
        "layers",
        "Every layer's router",
        f"Rows are kinds of linears, columns blocks of the backbone ({own[0].split} rows, step {step:,}). Pale "
        "entropy: each token relies on few experts, a cross where it is always the same one; dark mutual information: "
        f"layers that tell the tasks apart; {count}.",
        f"Heat maps of {len(own)} layers: {'; '.join(title for _, title, _ in measures)}.",
        ["layer", "entropy", "mutual_information", "dead", "collapsed"],
        [(r.layer, r.entropy, r.mutual_information, r.dead, r.collapsed) for r in own],
    )
