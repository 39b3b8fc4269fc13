"""What a run scored, as its page's table and in words."""

from typing import Any

from moe_peft.reporting import html, training
from moe_peft.reporting.html import Raw, Shown, code, paragraph, sentence
from moe_peft.reporting.run import Run
from moe_peft.reporting.words import signed

REFERENCES = {"base": "the untouched base", "majority": "the majority class"}


def results(run: Run, shown: Shown) -> list[Raw]:
    """The gains, the table of scores, and the same as a picture."""
    if run.results is None:
        name = "best" if (run.folder / "checkpoints" / "best.ckpt").is_file() else "last"
        words = f"There are no results: the run was not tested. {{}} tests its {name} checkpoint."
        files = f"--config {run.place}/config.yaml --ckpt_path {run.place}/checkpoints/{name}.ckpt"
        test = f"python -m moe_peft test {files}"
        return [paragraph(sentence(words, code(test)), "absent")]
    rows = {name: run.results["rows"].get(name) for name in (*REFERENCES, "model")}
    known = {name: row if isinstance(row, dict) else {"tasks": {}} for name, row in rows.items()}
    lines: list[list[object]] = []
    for task, score in run.scores.items():
        about = sentence("{} <small>{}, {} rows</small>", task, score["metric"], f"{score['n']:,}")
        lines.append([about, *(points(row["tasks"].get(task)) for row in known.values())])
    lines.append(["mean", *(points(row, "mean") for row in known.values())])
    blocks = [*gains(run), html.table("results", ["", *REFERENCES, run.method], lines, sums=1)]
    assert run.results_file is not None
    words = "Points (100 is perfect) ± one standard error, from {}."
    blocks.append(paragraph(sentence(words, code(run.results_file.name)), "note"))
    notes: dict[str, list[str]] = {}
    for task, note in run.results.get("notes", {}).items():
        notes.setdefault(note, []).append(task)
    blocks += [paragraph(f"{note}: {', '.join(tasks)}.", "note") for note, tasks in notes.items()]
    return [*blocks, *shown(training.scores(run.results))]


def gains(run: Run) -> list[Raw]:
    """How far the mean lies above those of the base and of the majority class, as far as these are known."""
    paired = {name: (run.results or {}).get("paired", {}).get(f"model-{name}") for name in REFERENCES}
    return [
        paragraph(
            f"{run.method} against {REFERENCES[name]}: {signed(100 * gain['difference'])} points in the mean; two "
            f"standard errors of the paired difference are {200 * gain['stderr']:.1f}."
        )
        for name, gain in paired.items()
        if isinstance(gain, dict)
    ]


def points(score: dict[str, Any] | None, name: str = "value") -> object:
    """A score in points with its standard error."""
    if score is None or not isinstance(score.get(name), float | int):
        return "n/a"
    return sentence("{} <small>±{}</small>", f"{100 * score[name]:.1f}", f"{100 * score['stderr']:.1f}")
