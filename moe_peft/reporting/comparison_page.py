"""Several runs as a page: one table of methods by tasks, and their curves on top of each other."""

import json
from collections.abc import Sequence
from pathlib import Path

from moe_peft.reporting import html
from moe_peft.reporting.comparison import Contestant, Spread, as_json, contestants, references
from moe_peft.reporting.comparison_pictures import learning, routers, scores
from moe_peft.reporting.drawing import Picture, drawing
from moe_peft.reporting.files import PICTURES, as_csv, write_page
from moe_peft.reporting.html import Raw, Section, code, paragraph, sentence
from moe_peft.reporting.run import Run
from moe_peft.reporting.words import duration, many
from moe_peft.writing import write_text

ROWS = {"majority": "majority class", "base": "untouched base"}


def write_comparison(runs: Sequence[Run], out: Path) -> Path:
    """Writes comparison.html, .csv and .json, and the pictures beside them.

    Args:
        runs: two or more.
        out: the folder to write into.

    Returns:
        The page.

    Raises:
        ValueError: runs that cannot be compared.
    """
    found = contestants(runs)
    tasks = list(next((run.scores for run in runs if run.scores), {})) or runs[0].tasks
    with drawing():
        drawn = [scores(found, tasks), learning(found, tasks), routers(found)]
    pictures = [picture for picture in drawn if picture is not None]
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "comparison.json", json.dumps(as_json(found, tasks), indent=2, ensure_ascii=False) + "\n")
    write_text(out / "comparison.csv", as_csv(*long_table(found, tasks)))
    return write_page(out / "comparison.html", render(found, tasks, pictures), pictures)


def long_table(found: Sequence[Contestant], tasks: Sequence[str]) -> tuple[list[str], list[tuple]]:
    """One line per contestant and task (and mean): mean and standard deviation over seeds."""
    rows: list[tuple] = []
    for name, own in references([run for one in found for run in one.runs]).items():
        rows += [(name, task, value.mean, "", "") for task, value in own.items() if value]
    for one in found:
        for task, value in [*((task, one.score(task)) for task in tasks), ("mean", one.mean())]:
            if value is not None:
                rows.append((one.label, task, value.mean, "" if value.sd is None else value.sd, len(value.values)))
    return ["contestant", "task", "mean", "sd", "seeds"], rows


def render(found: Sequence[Contestant], tasks: Sequence[str], pictures: Sequence[Picture]) -> str:
    """Makes the page's text."""
    runs = [run for one in found for run in one.runs]
    title = " against ".join(dict.fromkeys(run.method for run in runs))
    unfinished = [run for run in runs if not run.finished]
    head = [
        Raw(f"<h1>{html.text(title)}</h1>"),
        paragraph(f"{len(runs)} runs on {runs[0].base}", "subtitle"),
    ]
    if unfinished:
        names = ", ".join(str(run.folder) for run in unfinished)
        warning = sentence("<strong>Unfinished</strong>, so not in the means: {}.", names)
        head.append(Raw(f'<div class="banner">{warning}</div>'))
    by_name = {picture.name: html.figure(picture, PICTURES) for picture in pictures}

    def shown(*names: str) -> list[Raw]:
        return [by_name[name] for name in names if name in by_name]

    sections = [
        Section("results", "Results", [*results(found, tasks), *shown("compared_scores")]),
        Section("training", "Training", shown("compared_curves")),
        Section("routing", "Routing", shown("compared_routers")),
        Section("runs", "Runs", [run_table(found)]),
    ]
    return html.page(title, head, sections)


def results(found: Sequence[Contestant], tasks: Sequence[str]) -> list[Raw]:
    """The table of contestants by tasks."""
    if not any(one.finished for one in found):
        return [paragraph("No run is finished, so there are no scores to compare.", "absent")]
    rows: list[list[object]] = []
    for name, own in references([run for one in found for run in one.runs]).items():
        cells = [own.get(task) for task in [*tasks, "mean"]]
        rows.append([ROWS[name], *(points(cell and cell._replace(sd=None)) for cell in cells), "", ""])
    for one in found:
        parameters, seconds = one.fact("trainable_parameters"), one.fact("wall_seconds")
        finished, every = len(one.finished), many(len(one.runs), "run")
        count = every if finished == len(one.runs) else f"{finished} of {every}"
        name = sentence("{} <small>{}</small>", one.label, count)
        cells = [*(points(one.score(task)) for task in tasks), points(one.mean())]
        cells.append("" if parameters is None else f"{parameters.mean:,.0f}")
        cells.append("" if seconds is None else duration(seconds.mean))
        rows.append([name, *cells])
    header = ["", *tasks, "mean", "parameters", "training"]
    words = (
        "Points (100 is perfect), mean over seeds ± standard deviation over seeds; where there is one seed, none is "
        "shown, and a difference means little."
    )
    files = sentence("Numbers: {} and {}.", code("comparison.csv"), code("comparison.json"))
    return [html.table("results", header, rows), paragraph(words, "note"), paragraph(files, "note")]


def points(own: Spread | None) -> object:
    """A score in points with its spread."""
    if own is None:
        return "n/a"
    sd = "" if own.sd is None else f"±{100 * own.sd:.1f}"
    return sentence("{} <small>{}</small>", f"{100 * own.mean:.1f}", sd)


def run_table(found: Sequence[Contestant]) -> Raw:
    """Every run by itself."""
    rows = []
    for one in found:
        for run in one.runs:
            own = run.results if run.finished and run.results else {}
            mean, seconds = own.get("rows", {}).get("model", {}).get("mean"), own.get("wall_seconds")
            rows.append(
                [
                    str(run.folder),
                    one.label,
                    "none" if run.seed is None else run.seed,
                    "n/a" if not isinstance(mean, float) else f"{100 * mean:.1f}",
                    "unknown" if seconds is None else duration(seconds),
                    "finished" if run.finished else f"unfinished, step {run.steps or 0:,}",
                ]
            )
    return html.table("runs", ["run", "contestant", "seed", "mean", "training", ""], rows)
