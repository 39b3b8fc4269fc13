"""Generalisation: trained on all tasks but one, tested on that one as it is, and after k examples of it.

The fit on the other tasks has the learning rate that the comparison has chosen, and its first seed. What it has learnt
goes over by `TransferFrom`: at once (no step is made: zero-shot), or to be trained further on k examples. Where tasks
have embeddings, the new one's is the mean of the known ones, or the nearest one's. A classifier has no head for a task
that it was not trained on: only language models, which rank options by their text, have a zero-shot score.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from jsonargparse import Namespace

from moe_peft.budget import class_of
from moe_peft.callbacks.transfer import TransferFrom
from moe_peft.messages import arguments_of
from moe_peft.methods.tt_lora_moe import TTLoRAMoE
from moe_peft.rack.contest import Contest, Say
from moe_peft.rack.fits import RESULTS, Fit
from moe_peft.rack.identity import identity
from moe_peft.rack.rows import Row, digest, parse, sources_of
from moe_peft.rack.settings import merged, slug
from moe_peft.reporting.files import as_csv
from moe_peft.reporting.words import many
from moe_peft.writing import as_markdown, write_text

FOLDER, NAME = "left-out", "left-out"


class LeftOut(NamedTuple):
    """A method without one of the tasks."""

    row: Row
    task: str
    train: Fit
    zero: Fit | None
    """None where there is no zero-shot score."""
    few: Fit


def incapable(parsed: Namespace) -> str | None:
    """Says why a method cannot serve a task that it was not trained on; None where it can."""
    method = class_of(parsed.model.class_path)
    routed = any(own.class_path.endswith(".FreezeThenRoute") for own in parsed.trainer.callbacks or [])
    if routed or issubclass(method, TTLoRAMoE):
        return "its experts are those of the tasks that it was trained on"
    if method.task_decides and "unknown_task" not in arguments_of(method):
        return "it routes by task alone, and knows no other task's weights"
    return None


def planned(contest: Contest) -> str:
    """Says how many fits leaving one out takes, finished ones included."""
    settings = contest.comparison.leave_one_out
    assert settings is not None
    rows, tasks = able(contest), len(settings.tasks or contest.rows[0].tasks)
    fits = tasks * sum(2 if is_classifier(parsed_of(contest, row)) else 3 for row in rows)
    return f"leave-one-out: {many(fits, 'fit')} in all for {many(len(rows), 'row')}, after these"


def able(contest: Contest) -> list[Row]:
    """The rows that can serve a task that they were not trained on."""
    return [row for row in contest.rows if incapable(parsed_of(contest, row)) is None]


def parsed_of(contest: Contest, row: Row) -> Namespace:
    """A row's configuration, but for its size."""
    return parse(row.files, row.overlay, contest.more)


def is_classifier(parsed: Namespace) -> bool:
    """Whether the backbone has a head for every task."""
    return class_of(parsed.model.init_args.backbone.class_path).kind == "classifier"


def left_out(contest: Contest, row: Row, rate: float | None) -> Iterator[LeftOut]:
    """Gives a row's fits, task by task; nothing of them is written.

    Args:
        contest: whose.
        row: the method.
        rate: its learning rate.
    """
    settings = contest.comparison.leave_one_out
    assert settings is not None
    parsed = parsed_of(contest, row)
    sources = [own if isinstance(own, str) else own.as_dict() for own in parsed.data.init_args.tasks]
    known = "unknown_task" in arguments_of(class_of(parsed.model.class_path))
    for task in settings.tasks or row.tasks:
        at = row.tasks.index(task)
        others = {"data": {"init_args": {"tasks": sources[:at] + sources[at + 1 :]}}}
        train = fit_of(contest, row, rate, f"{slug(task)}-without", others)
        shots = {"data": {"init_args": {"tasks": [with_shots(sources[at], settings.shots)]}}}
        options = {"new_row": settings.new_row} if known else {}
        longer = row._replace(overlay=merged(row.overlay, settings.overlay))
        few = fit_of(contest, longer, rate, f"{slug(task)}-{settings.shots}-shot", shots, train, options)
        nothing = merged(shots, {"trainer": {"max_steps": 0}})
        zero = f"{slug(task)}-0-shot"
        bare = None if is_classifier(parsed) else fit_of(contest, row, rate, zero, nothing, train, options)
        yield LeftOut(row, task, train, bare, few)


def with_shots(source: Any, shots: int) -> dict[str, Any]:
    """A task's source with so many examples per class to train on."""
    if isinstance(source, str):
        source = {"class_path": "moe_peft.data.sources.TaskFolder", "init_args": {"path": source}}
    return merged(source, {"init_args": {"shots": shots, "train_rows": None}})


def fit_of(
    contest: Contest,
    row: Row,
    rate: float | None,
    name: str,
    decided: dict[str, Any],
    start: Fit | None = None,
    options: dict[str, Any] | None = None,
) -> Fit:
    """One of a row's fits.

    Args:
        contest: whose.
        row: the row.
        rate: its learning rate.
        name: of the fit.
        decided: laid over the row's configuration, the command line included.
        start: the fit whose checkpoint it starts from.
        options: further arguments of `TransferFrom`.
    """
    seed = contest.comparison.seeds[0]

    def starting(checkpoint: str) -> dict[str, Any]:
        callback = {"class_path": TransferFrom.__name__, "init_args": {"checkpoint": checkpoint, **(options or {})}}
        return merged(row.decided, decided, {} if start is None else {"trainer": {"callbacks+": [callback]}})

    # A start is known by its hash, so that a fit stays the same one in another folder.
    known = starting("" if start is None else digest(start.row, seed, rate))
    parsed = parse(row.files, row.overlay, contest.more, known)
    sources = sources_of(parsed)
    own = row._replace(
        tag=f"{row.tag}, {name}",
        decided=starting("" if start is None else str(start.folder)),
        identity=identity(parsed, sources),
        sources=sources,
    )
    folder = contest.comparison.out / FOLDER / slug(row.tag) / f"{name}-{digest(own, seed, rate)[:8]}"
    return Fit(own, seed, rate, folder, contest.more)


def run_left_out(contest: Contest, lock: int, say: Say) -> None:
    """Runs what is missing, and writes left-out.json, .csv and .md.

    Args:
        contest: whose; its own fits are finished.
        lock: a file descriptor for the fits to hold.
        say: takes a line for every fit.
    """
    done: list[LeftOut] = []
    cannot: dict[str, str] = {}
    for row in contest.rows:
        why, chosen = incapable(parsed_of(contest, row)), contest.chosen(row)
        if why is not None or chosen is None:
            cannot[row.tag] = why or "it diverged at every learning rate"
            continue
        for own in left_out(contest, row, chosen.rate):
            for fit in (own.train, own.zero, own.few):
                if fit is None or fit.finished or fit.failed or own.train.failed:
                    continue
                fit.run(lock)
                say(f"{fit.row.tag}: {'diverged' if fit.failed else 'done'}")
            done.append(own)
    write_left_out(contest, done, cannot, contest.comparison.out)


def write_left_out(contest: Contest, done: list[LeftOut], cannot: dict[str, str], out: Path) -> None:
    """Writes the tables."""
    settings = contest.comparison.leave_one_out
    assert settings is not None
    lines = [line for own in done for line in lines_of(own, settings.shots)]
    diverged = [fit.row.tag for own in done for fit in (own.train, own.zero, own.few) if fit is not None and fit.failed]
    content = {"rows": lines, "cannot": cannot, "diverged": diverged}
    write_text(out / f"{NAME}.json", json.dumps(content, indent=2) + "\n")
    header = ["tag", "task", "shots", "score", "stderr", "base", "commits", "run"]
    write_text(out / f"{NAME}.csv", as_csv(header, [[line[name] for name in header] for line in lines]))
    tasks = settings.tasks or contest.rows[0].tasks
    table = [["", "shots", *tasks, "mean"]]
    for tag, shots in dict.fromkeys((line["tag"], line["shots"]) for line in lines):
        scores = {line["task"]: line["score"] for line in lines if (line["tag"], line["shots"]) == (tag, shots)}
        mean = f"{100 * sum(scores.values()) / len(tasks):.1f}" if len(scores) == len(tasks) else "n/a"
        cells = [f"{100 * scores[task]:.1f}" if task in scores else "n/a" for task in tasks]
        table.append([tag, str(shots), *cells, mean])
    notes = [f"{tag} cannot: {why}." for tag, why in cannot.items()]
    notes += [f"{tag}: diverged." for tag in diverged]
    notes.append("A classifier has no head for a new task, so that only language models have a score with 0 shots.")
    notes.append(
        "Every learning rate was chosen with all tasks' validation rows, the left-out one's among them; "
        "of the steps on examples, the checkpoint is tested that is best on the left-out task's validation rows."
    )
    text = ["# Trained on all tasks but one, tested on that one", "", *as_markdown(table), ""]
    write_text(out / f"{NAME}.md", "\n".join([*text, *(f"- {note}" for note in notes), ""]))


def lines_of(own: LeftOut, shots: int) -> Iterator[dict[str, Any]]:
    """What a method scored without a task, and then with examples of it."""
    for number, fit in ((0, own.zero), (shots, own.few)):
        if fit is None or not fit.finished:
            continue
        rows = json.loads((fit.folder / RESULTS).read_text(encoding="utf-8"))["rows"]
        score, base = rows["model"]["tasks"][own.task], rows["base"]
        yield {
            "tag": own.row.tag,
            "task": own.task,
            "shots": number,
            "score": score["value"],
            "stderr": score["stderr"],
            "base": base["tasks"][own.task]["value"] if isinstance(base, dict) else None,
            "commits": " ".join(fit.about["commits"]),
            "run": str(fit.folder),
        }
