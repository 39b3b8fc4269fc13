"""What a comparison writes: compare.json, compare.csv, compare.md and the page compare.html with its pictures."""

import json
from collections.abc import Sequence
from pathlib import Path

from moe_peft.rack.contest import Contest
from moe_peft.rack.measures import ROUTER, Line, measure, plain, standard_error, tried
from moe_peft.rack.page import page
from moe_peft.reporting.comparison import Spread, check_scores, references
from moe_peft.reporting.drawing import drawing
from moe_peft.reporting.files import as_csv, write_page
from moe_peft.reporting.words import many
from moe_peft.writing import as_markdown, write_text

NAME = "compare"
MANY = 10
"""Seeds from which on two standard errors mean what they are taken for."""
COSTS = ("adapter_parameters", "trainable_parameters", "deployed_parameters", "stored_bytes")
SCORES = (
    "Points (100 is perfect), mean over seeds ± standard error over seeds.",
    "The paired difference is over the same test rows and seeds, ± its standard error: the root of the sum of squares "
    "of that over rows (of the seeds' mean differences) and that over seeds (one seed: over rows alone).",
)
FEW = (
    "A standard error over {} is itself uncertain: where two methods are equal, chance alone passes two of them more "
    "often than one time in twenty (with three seeds about one in eight), so take differences below three as open."
)
CHOICE = "Every learning rate was chosen on validation data with the first seed, which is one of the seeds averaged."
BUDGET = "Rows below the budget, or more than a fifth above it, say so."
COST = (
    "Adapters: their trainable parameters; trainable: heads too; deployed: all numbers beside the base that inference "
    "needs, before any merging; FLOPs: matrix products of a forward per token, over the bare base's; step: median; "
    "memory: the device's peak, on a CPU the process's."
)


def write_tables(contest: Contest, out: Path) -> Path:
    """Measures what is finished and writes every table.

    Args:
        contest: whose fits.
        out: the folder to write into.

    Returns:
        The page.

    Raises:
        ValueError: no row has a finished run whose learning rate is the chosen one.
    """
    lines = measure(contest)
    runs = [run for line in lines for run in line.contestant.runs]
    if not runs:
        raise ValueError(
            "methods: no row's learning rate is chosen yet; wait for its fits, or give lower learning_rates where they "
            "diverged"
        )
    check_scores(runs)
    tasks = contest.rows[0].tasks
    left = [row for row in contest.rows if row.tag not in [line.row.tag for line in lines]]
    diverged = [row.tag for row in left if contest.diverged(row)]
    missing = [row.tag for row in left if row.tag not in diverged]
    content = {
        "base": contest.rows[0].base,
        "tasks": tasks,
        "budget": contest.budget,
        "reference": contest.comparison.reference,
        "seeds": contest.comparison.seeds,
        "learning_rates": contest.comparison.rates,
        "references": {
            name: {task: own and own.mean for task, own in row.items()} for name, row in references(runs).items()
        },
        "rows": [plain(line, tasks) for line in lines],
        "diverged": diverged,
        "missing": missing,
    }
    write_text(out / f"{NAME}.json", json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    write_text(out / f"{NAME}.csv", as_csv(*wide_table(lines, tasks)))
    ranked = sorted(lines, key=lambda line: -(own.mean if (own := line.contestant.mean()) else 0.0))
    absent = (("Diverged at every rate", diverged), ("Not run yet", missing))
    notes = [*notes_of(contest), *(f"{what}: {', '.join(tags)}." for what, tags in absent if tags)]
    write_text(out / f"{NAME}.md", markdown(contest, ranked, tasks, notes))
    with drawing():
        text, pictures = page(contest, ranked, tasks, notes)
    return write_page(out / f"{NAME}.html", text, pictures)


def notes_of(contest: Contest) -> list[str]:
    """What the numbers mean."""
    settings = contest.comparison
    few = [FEW.format(many(len(settings.seeds), "seed"))] if 1 < len(settings.seeds) < MANY else []
    choice = [] if settings.rates is None else [CHOICE]
    return [*SCORES, *few, *choice, *([] if contest.budget is None else [BUDGET]), COST]


def wide_table(lines: Sequence[Line], tasks: Sequence[str]) -> tuple[list[str], list[tuple]]:
    """A line per row of the comparison, every number in a column of its own."""
    header = ["tag", "method", "learning_rate", "seeds", "mean", "mean_stderr", "paired", "paired_stderr"]
    header += [name for task in tasks for name in (task, f"{task}_stderr")]
    header += [*COSTS, "flops_per_token", "step_rows", "step_seconds", "peak_bytes", *ROUTER]
    header += ["commits", "config", "runs"]
    rows = []
    for line in lines:
        scores = [line.contestant.mean(), *(line.contestant.score(task) for task in tasks)]
        numbers = [value for own in scores for value in (own and own.mean, standard_error(own))]
        paired = (None, None) if line.paired is None else (line.paired.difference, line.paired.stderr)
        rows.append(
            (
                *(line.row.tag, line.row.method, line.rate, len(line.fits), *numbers[:2], *paired, *numbers[2:]),
                *(line.row.parameters, line.trainable, *line.stored),
                *(line.flops and line.flops.adapters, line.step_rows, line.step_seconds, line.peak_bytes),
                *(line.router.get(name) for name in ROUTER),
                *(" ".join(own) for own in (line.commits, map(str, line.row.files))),
                " ".join(str(fit.folder) for fit in line.fits),
            )
        )
    return header, rows


def points(own: Spread | None) -> str:
    """A score in points with its standard error."""
    if own is None:
        return "n/a"
    error = standard_error(own)
    return f"{100 * own.mean:.1f}" + ("" if error is None else f" ±{100 * error:.1f}")


def gain(line: Line) -> str:
    """A paired difference in points with its standard error."""
    return "" if line.paired is None else f"{100 * line.paired.difference:+.1f} ±{100 * line.paired.stderr:.1f}"


def markdown(contest: Contest, lines: Sequence[Line], tasks: Sequence[str], notes: Sequence[str]) -> str:
    """The content of compare.md: scores, costs, and where every row comes from."""
    runs = [run for line in lines for run in line.contestant.runs]
    against = f"against {contest.comparison.reference}"
    scores = [["", "mean", against, *tasks]]
    for name, row in references(runs).items():
        mean, *cells = (f"{100 * own.mean:.1f}" if (own := row.get(task)) else "n/a" for task in ["mean", *tasks])
        scores.append([name, mean, "", *cells])
    for line in lines:
        cells = [points(line.contestant.score(task)) for task in tasks]
        scores.append([line.label, points(line.contestant.mean()), gain(line), *cells])
    costs = [["", "adapters", "trainable", "deployed", "stored bytes", "FLOPs / token", "rows / step"]]
    costs[0] += ["s / step", "memory, MiB", "router entropy", "mutual information", "dead", "collapsed"]
    for line in lines:
        flops = None if line.flops is None else line.flops.adapters
        numbers = [line.row.parameters, line.trainable, *line.stored, flops, line.step_rows]
        step = "" if line.step_seconds is None else f"{line.step_seconds:.2f}"
        router = [f"{line.router[name]:.2f}" if name in line.router else "" for name in ROUTER]
        cells = ["n/a" if number is None else f"{number:,}" for number in numbers]
        costs.append([line.row.tag, *cells, step, f"{line.peak_bytes / 2**20:,.0f}", *router])
    origins = [["", "learning rate", "validation of all rates tried", "configuration", "commit", "runs"]]
    for line in lines:
        rate = "its own" if line.rate is None else f"{line.rate:g}"
        config = ", ".join(f"`{file}`" for file in line.row.files)
        folders = ", ".join(f"`{fit.folder}`" for fit in line.fits)
        origins.append([line.row.tag, rate, tried(line), config, ", ".join(line.commits), folders])
    budget = "none" if contest.budget is None else f"{contest.budget:,} adapter parameters"
    return "\n".join(
        [
            f"# {len(lines)} methods on {contest.rows[0].base}",
            "",
            f"Budget: {budget}. Seeds: {', '.join(map(str, contest.comparison.seeds))}.",
            "",
            *(text for table in (scores, costs, origins) for text in (*as_markdown(table), "")),
            *(f"- {note}" for note in notes),
            "",
        ]
    )
