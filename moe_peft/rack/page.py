"""A comparison as a page: scores, differences, costs, routers, and where every row comes from."""

from collections.abc import Sequence

from moe_peft.rack.contest import Contest
from moe_peft.rack.measures import ROUTER, Line, standard_error, tried
from moe_peft.rack.pictures import by_task, differences
from moe_peft.reporting import html
from moe_peft.reporting.comparison import Contestant, Spread, references
from moe_peft.reporting.comparison_page import ROWS
from moe_peft.reporting.comparison_pictures import learning, routers, scores
from moe_peft.reporting.drawing import Picture
from moe_peft.reporting.files import PICTURES
from moe_peft.reporting.html import Raw, Section, code, paragraph, sentence
from moe_peft.reporting.theme import SERIES
from moe_peft.reporting.words import many, signed


def page(
    contest: Contest, lines: Sequence[Line], tasks: Sequence[str], notes: Sequence[str]
) -> tuple[str, list[Picture]]:
    """Makes the page's text and its pictures; within `drawing`.

    Args:
        contest: whose.
        lines: the rows of the table, the best first.
        tasks: their names.
        notes: what the numbers mean.
    """
    found, reference = [line.contestant for line in lines], contest.comparison.reference
    if len(found) <= len(SERIES):
        result, routing, curves = scores(found, tasks), routers(found), learning(found, tasks)
    else:  # more than there are colours
        result, routing, curves = by_task(lines, reference), None, learning(leading(lines, reference), tasks)
        curves = curves and curves._replace(
            caption=f"{reference} and the best {len(SERIES) - 1} others. {curves.caption}"
        )
    drawn = {"results": [differences(lines, reference), result], "routing": [routing], "training": [curves]}
    shown = {name: [html.figure(own, PICTURES) for own in pictures if own] for name, pictures in drawn.items()}
    budget = "" if contest.budget is None else f", budget {contest.budget:,} adapter parameters"
    runs = [run for one in found for run in one.runs]
    head = [
        Raw(f"<h1>{html.text(many(len(lines), 'method'))} compared</h1>"),
        paragraph(f"{contest.rows[0].base}, {many(len(tasks), 'task')}, {many(len(runs), 'run')}{budget}", "subtitle"),
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


def leading(lines: Sequence[Line], reference: str) -> list[Contestant]:
    """The reference and the best others, as many as there are colours."""
    first = [line.contestant for line in lines if line.row.tag == reference]
    others = [line.contestant for line in lines if line.row.tag != reference]
    return [*first, *others][: len(SERIES)]


def score_table(contest: Contest, lines: Sequence[Line], tasks: Sequence[str]) -> Raw:
    """Rows by tasks."""
    rows: list[list[object]] = []
    for name, own in references([run for line in lines for run in line.contestant.runs]).items():
        cells = [own.get(task) for task in ["mean", *tasks]]
        mean, *rest = ("n/a" if cell is None else f"{100 * cell.mean:.1f}" for cell in cells)
        rows.append([ROWS[name], mean, "", *rest])
    for line in lines:
        cells = [points(line.contestant.score(task)) for task in tasks]
        paired = line.paired
        against: object = "" if paired is None else with_error(signed(100 * paired.difference), paired.stderr)
        rows.append([line.label, points(line.contestant.mean()), against, *cells])
    return html.table("results", ["", "mean", f"against {contest.comparison.reference}", *tasks], rows)


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
