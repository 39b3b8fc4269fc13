"""A comparison as a page: scores, differences, costs, routers, and where every row comes from."""

from collections.abc import Sequence

from moe_peft.rack.contest import Contest
from moe_peft.rack.measures import ROUTER, Line, standard_error, tried
from moe_peft.reporting import html
from moe_peft.reporting.comparison import Spread, references
from moe_peft.reporting.comparison_page import ROWS
from moe_peft.reporting.comparison_pictures import learning, routers, scores
from moe_peft.reporting.drawing import Picture, Sheet, gutter, short
from moe_peft.reporting.files import PICTURES
from moe_peft.reporting.html import Raw, Section, code, paragraph, sentence
from moe_peft.reporting.theme import INK, MUTED, SERIES
from moe_peft.reporting.words import many, signed


def page(
    contest: Contest, lines: Sequence[Line], tasks: Sequence[str], notes: Sequence[str]
) -> tuple[str, list[Picture]]:
    """Makes the page's text and its pictures; within `drawing`.

    Args:
        contest: whose.
        lines: the rows of the table.
        tasks: their names.
        notes: what the numbers mean.
    """
    found = [line.contestant for line in lines]
    drawn = {
        "results": [differences(lines, contest.comparison.reference), scores(found, tasks)],
        "routing": [routers(found)],
        "training": [learning(found, tasks)],
    }
    shown = {name: [html.figure(own, PICTURES) for own in pictures if own] for name, pictures in drawn.items()}
    budget = "" if contest.budget is None else f", budget {contest.budget:,} adapter parameters"
    runs = [run for one in found for run in one.runs]
    head = [
        Raw(f"<h1>{html.text(many(len(lines), 'method'))} compared</h1>"),
        paragraph(f"{runs[0].base}, {many(len(tasks), 'task')}, {many(len(runs), 'run')}{budget}", "subtitle"),
    ]
    files = sentence("Numbers: {}, {} and {}.", code("compare.json"), code("compare.csv"), code("compare.md"))
    sections = [
        Section(
            "results",
            "Results",
            [
                score_table(contest, lines, tasks),
                *(paragraph(note, "note") for note in (*notes, files)),
                *shown["results"],
            ],
        ),
        Section("costs", "Costs", [cost_table(lines)]),
        Section(
            "routing", "Routing", [router_table(lines), *shown["routing"]] if any(own.router for own in lines) else []
        ),
        Section("training", "Training", shown["training"]),
        Section("runs", "Runs", [origin_table(lines)]),
    ]
    return html.page("Methods compared", head, sections), [own for part in drawn.values() for own in part if own]


def score_table(contest: Contest, lines: Sequence[Line], tasks: Sequence[str]) -> Raw:
    """Rows by tasks."""
    rows: list[list[object]] = []
    for name, own in references([run for line in lines for run in line.contestant.runs]).items():
        cells = [own.get(task) for task in [*tasks, "mean"]]
        rows.append([ROWS[name], *("n/a" if cell is None else f"{100 * cell.mean:.1f}" for cell in cells), ""])
    for line in lines:
        cells = [*(line.contestant.score(task) for task in tasks), line.contestant.mean()]
        paired = line.paired
        against: object = "" if paired is None else with_error(signed(100 * paired.difference), paired.stderr)
        rows.append([line.label, *map(points, cells), against])
    return html.table("results", ["", *tasks, "mean", f"against {contest.comparison.reference}"], rows)


def points(own: Spread | None) -> object:
    """A score in points with its standard error."""
    return "n/a" if own is None else with_error(f"{100 * own.mean:.1f}", standard_error(own))


def with_error(value: str, error: float | None) -> object:
    """A number with its standard error, small, if that is known."""
    return value if error is None else sentence("{} <small>±{}</small>", value, f"{100 * error:.1f}")


def cost_table(lines: Sequence[Line]) -> Raw:
    """What every row costs."""
    header = ["", "adapters", "trainable", "deployed", "stored bytes", "FLOPs per token", "rows per step"]
    header += ["s per step", "memory, MiB"]
    rows: list[list[object]] = []
    for line in lines:
        flops = None if line.flops is None else line.flops.adapters
        numbers = [line.row.parameters, line.trainable, *line.stored, flops, line.step_rows]
        step = "n/a" if line.step_seconds is None else f"{line.step_seconds:.2f}"
        cells = ["n/a" if number is None else f"{number:,}" for number in numbers]
        rows.append([line.row.tag, *cells, step, f"{line.peak_bytes / 2**20:,.0f}"])
    return html.table("costs", header, rows)


def router_table(lines: Sequence[Line]) -> Raw:
    """What the routing of every row that has any looked like on the test rows, or at the last validation."""
    rows = [[line.row.tag, *(f"{line.router[name]:.2f}" for name in ROUTER)] for line in lines if line.router]
    return html.table("routers", ["", *(name.replace("_", " ") for name in ROUTER)], rows)


def origin_table(lines: Sequence[Line]) -> Raw:
    """Where every row comes from: the rates that were tried, configuration, commit and run folders."""
    rows: list[list[object]] = []
    for line in lines:
        rate = "its own" if line.rate is None else f"{line.rate:g}"
        config, runs = (", ".join(map(str, own)) for own in (line.row.files, [fit.folder for fit in line.fits]))
        rows.append([line.row.tag, rate, tried(line), config, ", ".join(line.commits), runs])
    return html.table("runs", ["", "rate", "validation by rate", "configuration", "commit", "runs"], rows)


def differences(lines: Sequence[Line], reference: str) -> Picture | None:
    """Draws the paired differences, the best on top, with two standard errors."""
    found = sorted(
        ((line.row.tag, line.paired) for line in lines if line.paired is not None),
        key=lambda own: -own[1].difference,
    )
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
