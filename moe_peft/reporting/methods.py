"""Pictures that belong to one method: MoRE's ranks, T-REX's gates and clusters, and the map of tasks."""

from collections.abc import Callable, Sequence

import numpy as np

from moe_peft.reporting.drawing import GAP, KEY, Picture, Sheet, gutter, heat, key, label_axis, short
from moe_peft.reporting.records import Cluster, Gate, Point, Rank, of_best_split
from moe_peft.reporting.routers import row_shares
from moe_peft.reporting.routing import grid
from moe_peft.reporting.theme import HEAT, INK, MUTED, PAPER, SERIES

PRIOR = "A prior weight near 1: the layer is routed by the sample's meaning, near 0: by each token"
NO_PRIOR = "There is no prior: both gates scale what the router gives"


def rank_table(ranks: Sequence[Rank]) -> Picture:
    """Draws the rank that every task chose for every linear: a panel per task."""
    tasks = list(dict.fromkeys(own.task for own in ranks))
    layout = grid(list(dict.fromkeys(own.linear for own in ranks)))
    top = max(max(own.rank, own.start) for own in ranks)
    left, wide, high = gutter(layout.kinds), max(0.24 * len(layout.blocks), 2.4), 0.19 * len(layout.kinds)
    sheet = Sheet(left + max(wide + 0.2, KEY), 0.1 + (high + 0.36) * len(tasks) + 0.55)
    for panel, task in enumerate(tasks):
        axes = sheet.axes(left, 0.3 + (high + 0.36) * panel, wide, high)
        own = [rank.rank for rank in ranks if rank.task == task]
        axes.set_title(f"{short(task)}, mean {np.mean(own):.1f}")
        heat(axes, layout.spread({rank.linear: rank.rank for rank in ranks if rank.task == task}), top, numbers=".0f")
        label_axis(axes.yaxis, layout.kinds, most=len(layout.kinds))
        label_axis(axes.xaxis, [str(block) for block in layout.blocks], most=16)
        if panel < len(tasks) - 1:
            axes.set_xticklabels([])
    key(sheet, left, sheet.height - 0.3, {1.0: "1", float(top): str(top)}, top, "rank")
    start = ", ".join(str(rank) for rank in sorted({own.start for own in ranks if own.start}))
    began = f"; training began at rank {start}" if start else ""
    return sheet.picture(
        "rank_table",
        "The rank that every task chose",
        f"Rows are kinds of linears, columns blocks of the backbone{began}. Look for tasks "
        "whose panels differ, and for linears that a task has cut down or grown.",
        f"Heat maps of the chosen rank per linear for {len(tasks)} tasks.",
        Rank._fields,
        ranks,
    )


def gates(records: Sequence[Gate], prior: bool = True) -> Picture:
    """Draws both gates of every linear at the last step, and their way there.

    Args:
        records: of all steps.
        prior: whether there is a prior, whose weight is 1 - omega; without one omega scales the router's part alone.
    """
    step = max(own.step for own in records)
    last = [own for own in records if own.step == step]
    layout = grid([own.layer for own in last])
    left, wide, high = gutter(layout.kinds), max(0.17 * len(layout.blocks), 2.8), 0.19 * len(layout.kinds)
    steps = sorted({own.step for own in records})
    history = len(steps) > 1
    sheet = Sheet(max(left + wide + 0.2, 6.5), 2 * (high + 0.42) + 0.65 + (1.9 if history else 0))
    name, unit = ("prior weight 1 − ω", "1 − ω, m") if prior else ("token weight ω", "ω, m")
    omega: Callable[[Gate], float] = (lambda own: 1 - own.omega) if prior else (lambda own: own.omega)
    measures: dict[str, Callable[[Gate], float]] = {name: omega, "magnitude m": lambda own: own.magnitude}
    for panel, (title, value) in enumerate(measures.items()):
        axes = sheet.axes(left, 0.3 + (high + 0.42) * panel, wide, high)
        values = [value(own) for own in last]
        axes.set_title(f"{title}: {min(values):.3f} to {max(values):.3f}, mean {np.mean(values):.3f}")
        heat(axes, layout.spread({own.layer: value(own) for own in last}), 1.0)
        label_axis(axes.yaxis, layout.kinds, most=len(layout.kinds))
        label_axis(axes.xaxis, [str(block) for block in layout.blocks], most=16)
        if history:
            axes = sheet.axes(0.45 + 3.1 * panel, 2 * (high + 0.42) + 0.98, 2.7, 1.1)
            per_step = [[value(own) for own in records if own.step == at] for at in steps]
            axes.fill_between(steps, [*map(min, per_step)], [*map(max, per_step)], color=SERIES[0], alpha=0.12, lw=0)
            axes.plot(steps, [*map(np.mean, per_step)], color=SERIES[0])
            axes.set_ylim(0, 1)
            axes.set_xlabel("step")
            axes.set_title(f"{title}, mean and range", fontsize=7.5)
            axes.grid(axis="y")
    key(sheet, left, 2 * (high + 0.42) + 0.35, {0.0: "0", 0.5: "0.5", 1.0: "1"}, 1.0, unit)
    return sheet.picture(
        "gates",
        "How much each layer listens to the prior" if prior else "How far each layer has opened its gates",
        f"At step {step:,}, per kind of linear and block. {PRIOR if prior else NO_PRIOR}; a magnitude near 0: the "
        "layer has switched its adapter off.",
        f"Heat maps of {name} and magnitude of {len(last)} linears.",
        ["step", "layer", "prior_weight" if prior else "token_weight", "magnitude"],
        [(own.step, own.layer, omega(own), own.magnitude) for own in records],
    )


def cluster_occupancy(records: Sequence[Cluster]) -> Picture:
    """Draws which share of each task's rows is nearest to each cluster of the semantic prior."""
    own = of_best_split(list(records))
    tasks, clusters = (list(dict.fromkeys(getattr(row, name) for row in own)) for name in ("task", "cluster"))
    values = np.full((len(tasks), len(clusters)), np.nan)
    for row in own:
        values[tasks.index(row.task), clusters.index(row.cluster)] = row.share
    sheet = row_shares(tasks, clusters, 100 * values)
    return sheet.picture(
        "clusters",
        "What the prior takes for alike",
        f"Percent of each task's rows ({own[0].split}) that lie nearest to each cluster. A cluster that several tasks "
        "share lets them share experts; a task spread over many clusters holds many kinds of rows.",
        f"Heat map of {len(tasks)} tasks by {len(clusters)} clusters: share of rows.",
        Cluster._fields,
        own,
    )


def task_map(points: Sequence[Point]) -> Picture:
    """Draws tasks and clusters where the method sees them."""
    room = min(2.5, max(1.0, (len(points) / 24) ** 0.5))
    wide, high = 6.3 * room, 4.2 * room
    sheet = Sheet(wide + 0.3, high + 0.3)
    axes = sheet.axes(0.15, 0.15, wide, high)
    for kind, marker, fill, size in (("cluster", "s", PAPER, 4), ("task", "o", HEAT, 6)):
        own = [point for point in points if point.kind == kind]
        style = {"markersize": size, "color": HEAT, "markerfacecolor": fill}
        axes.plot([point.x for point in own], [point.y for point in own], marker, **style)
    axes.margins(0.14, 0.1)
    axes.set_aspect("equal", adjustable="datalim")
    axes.apply_aspect()  # now, so that labels know where the points are
    for spine in axes.spines.values():
        spine.set_visible(True)
    axes.set_xticks([])
    axes.set_yticks([])
    taken: list[tuple[float, float, float, float]] = []
    to_inches = sheet.figure.dpi_scale_trans.inverted()
    for point in sorted(points, key=lambda own: own.kind != "task"):
        at = to_inches.transform(axes.transData.transform((point.x, point.y))).tolist()
        task = point.kind == "task"
        size = 8.5 if task else 6.5
        left, bottom, width, height = place_label(
            at, 0.0078 * size * len(short(point.name)), size / 72, taken, sheet.width
        )
        taken.append((left, bottom, width, height))
        sheet.text(
            left, sheet.height - bottom - height / 2, short(point.name), color=INK if task else MUTED, fontsize=size
        )
    clusters = " and clusters (squares)" if any(point.kind == "cluster" for point in points) else ""
    shown = points[0].x_share + points[0].y_share
    share = "" if np.isnan(shown) else f", which show {100 * shown:.0f}% of how they differ"
    return sheet.picture(
        "task_map",
        "Tasks on a map",
        f"Tasks (dots){clusters} in the two directions in which they differ most{share}. Neighbours look alike to the "
        "method, and are likely to share experts; only distances mean something.",
        f"Scatter of {len(points)} points: {', '.join(point.name for point in points if point.kind == 'task')}.",
        Point._fields,
        points,
    )


def place_label(
    at: Sequence[float], width: float, height: float, taken: Sequence[tuple[float, float, float, float]], edge: float
) -> tuple[float, float, float, float]:
    """Finds a place beside a point where a label covers none that is there; else the first that is on the sheet.

    Args:
        at: the point, in inches.
        width: of the label.
        height: of the label.
        taken: boxes of the labels there are: left, bottom, width, height.
        edge: where the sheet ends on the right.
    """
    x, y = at
    middle = y - height / 2
    places = [(x + GAP, middle), (x - GAP - width, middle), (x - width / 2, y + GAP), (x - width / 2, y - GAP - height)]
    lines = (1, -1, 2, -2, 3, -3)
    places += [(x + GAP, middle + line * height) for line in lines]
    places += [(x - GAP - width, middle + line * height) for line in lines]
    places = [place for place in places if place[0] >= 0 and place[0] + width <= edge] or [(0.0, y + GAP)]

    def free(left: float, bottom: float) -> bool:
        return not any(
            left < a + w and a < left + width and bottom < b + h and b < bottom + height for a, b, w, h in taken
        )

    left, bottom = next((place for place in places if free(*place)), places[0])
    return left, bottom, width, height
