"""The lines of the table: what every row of a comparison scored, and what it costs."""

import json
import math
from collections.abc import Sequence
from statistics import fmean, median
from typing import Any, NamedTuple

import torch

from moe_peft.callbacks.costs import FILE as COSTS
from moe_peft.checkpoint import read_checkpoint
from moe_peft.counting import build_on_meta, model_parser
from moe_peft.predictions import Ranking
from moe_peft.rack.contest import Contest, validation_score
from moe_peft.rack.fits import Fit
from moe_peft.rack.flops import Flops, forward_flops
from moe_peft.rack.paired import Paired, paired, read_answers
from moe_peft.rack.rows import Row
from moe_peft.reporting.comparison import Contestant, Spread
from moe_peft.reporting.comparison_pictures import during_training
from moe_peft.reporting.routing import ALL
from moe_peft.reporting.run import Run
from moe_peft.reporting.words import many
from moe_peft.runs import find_checkpoint

FAR = 1.2
"""Times the budget; a row above is marked."""
ROUTER = ("entropy", "mutual_information", "dead", "collapsed")


class Stored(NamedTuple):
    """What a checkpoint of an adapter holds."""

    deployed_parameters: int
    """Numbers that inference needs beside the base: buffers such as centroids included, before any merging."""
    stored_bytes: int


class Line(NamedTuple):
    """A row of the table; its runs are those with the chosen learning rate."""

    row: Row
    label: str
    """The tag, and what a reader must know who compares: seeds that are missing, a size far from the budget."""
    fits: list[Fit]
    failed: list[Fit]
    """Those of the chosen rate that diverged."""
    contestant: Contestant
    tried: list[tuple[Fit, float | None]]
    """The fits of the first seed, with their scores on validation data; None for one that diverged."""
    paired: Paired | None
    """None for the reference itself."""
    trainable: int
    """Parameters, heads included."""
    stored: Stored
    flops: Flops | None
    step_rows: int | None
    """Rows of an optimizer step."""
    step_seconds: float | None
    peak_bytes: int
    router: dict[str, float]

    @property
    def commits(self) -> list[str]:
        """Of the code that the runs were made with."""
        return list(dict.fromkeys(commit for fit in self.fits for commit in fit.about["commits"]))

    @property
    def rate(self) -> float | None:
        """The chosen learning rate; None for the method's own."""
        return self.fits[0].rate


def standard_error(own: Spread | None) -> float | None:
    """Standard error of a mean over seeds."""
    return None if own is None or own.sd is None else own.sd / math.sqrt(len(own.values))


def measure(contest: Contest) -> list[Line]:
    """Measures every row that has a finished run."""
    found: dict[str, list[Fit]] = {}
    for row in contest.rows:
        chosen = contest.chosen(row)
        found[row.tag] = [] if chosen is None else contest.repeated(row, chosen.rate)
    finished = {tag: [fit for fit in fits if fit.finished] for tag, fits in found.items()}
    reference = finished.get(contest.comparison.reference, [])
    return [
        line_of(contest, row, finished[row.tag], [fit for fit in found[row.tag] if fit.failed], reference)
        for row in contest.rows
        if finished[row.tag]
    ]


def line_of(contest: Contest, row: Row, fits: list[Fit], failed: list[Fit], reference: Sequence[Fit]) -> Line:
    """Measures one row.

    Args:
        contest: whose.
        row: the row.
        fits: its finished ones, with the chosen learning rate.
        failed: those that diverged with it.
        reference: those of the row to compare with.
    """
    runs = [Run(fit.folder) for fit in fits]
    costs = [json.loads((fit.folder / COSTS).read_text(encoding="utf-8")) for fit in fits]
    steps = [own["step_seconds"] for own in costs if own["step_seconds"] is not None]
    assert runs[0].results is not None
    return Line(
        row,
        labelled(contest, row, len(fits), len(failed)),
        fits,
        failed,
        Contestant(row.tag, runs),
        [(fit, validation_score(fit)) for fit in contest.tried(row)],
        None if row.tag == contest.comparison.reference else against(row, fits, reference, runs[0].results["ranking"]),
        runs[0].results["trainable_parameters"],
        stored(fits[0]),
        flops_of(runs[0], row),
        (runs[0].config.get("data") or {}).get("init_args", {}).get("batch_size"),
        median(steps) if steps else None,
        max(own["peak_device_bytes"] or own["peak_resident_bytes"] for own in costs),
        router_of(runs),
    )


def labelled(contest: Contest, row: Row, seeds: int, failed: int) -> str:
    """A row's tag, with what sets it apart in brackets."""
    share = 1.0 if contest.budget is None else row.parameters / contest.budget
    marks = [f"{share:.2g} × the budget"] if not 1 <= share <= FAR else []
    asked = len(contest.comparison.seeds)
    marks += [f"{seeds} of {many(asked, 'seed')}"] if seeds < asked else []
    marks += [f"{failed} diverged"] if failed else []
    return f"{row.tag} ({', '.join(marks)})" if marks else row.tag


def tried(line: Line) -> str:
    """The scores on validation data by learning rate."""
    scores = ["diverged" if fit.failed else "n/a" if own is None else f"{100 * own:.1f}" for fit, own in line.tried]
    rates = ["" if fit.rate is None else f"{fit.rate:g}: " for fit, _ in line.tried]
    return ", ".join(rate + score for rate, score in zip(rates, scores, strict=True))


def stored(fit: Fit) -> Stored:
    """Returns what a fit's adapter holds: as noted where the fit came out of an archive, else by its checkpoint."""
    about = fit.about
    if Stored._fields[0] in about:
        return Stored(*(about[name] for name in Stored._fields))
    tensors = read_checkpoint(find_checkpoint(fit.folder), "checkpoint")["state_dict"].values()
    return Stored(sum(tensor.numel() for tensor in tensors), sum(tensor.nbytes for tensor in tensors))


def against(row: Row, fits: Sequence[Fit], reference: Sequence[Fit], ranking: Ranking) -> Paired | None:
    """Compares a row with the reference, on the seeds that both have; None where they have none in common."""
    there = {fit.seed: fit for fit in reference}
    pairs = [(read_answers(fit.folder), read_answers(there[fit.seed].folder)) for fit in fits if fit.seed in there]
    if not pairs:
        return None
    return paired([source.spec() for source in row.sources], pairs, ranking)


def flops_of(run: Run, row: Row) -> Flops | None:
    """Counts the FLOPs of a run's model, from its configuration; the base may have moved since."""
    config = model_parser().parse_object({"model": run.config["model"]})
    base = config.model.init_args.backbone.init_args
    base.name, base.gradient_checkpointing = row.base, False
    with torch.random.fork_rng():
        return forward_flops(build_on_meta(config, len(row.sources)))


def router_of(runs: Sequence[Run]) -> dict[str, float]:
    """Means over layers and seeds of what the routing looked like in the test, or at the last validation."""
    last = []
    for run in runs:
        tests = [own for own in run.summary if own.layer == ALL and own.split == "test"]
        if means := tests or during_training(run.summary):
            last.append(means[-1])
    return {name: fmean(getattr(own, name) for own in last) for name in ROUTER} if last else {}


def plain(line: Line, tasks: Sequence[str]) -> dict[str, Any]:
    """A row of the table as plain types."""

    def scored(own: Spread | None) -> dict[str, Any] | None:
        return None if own is None else {"mean": own.mean, "stderr": standard_error(own), "values": own.values}

    flops = None if line.flops is None else line.flops._asdict()
    return {
        "tag": line.row.tag,
        "method": line.row.method,
        "config": [str(file) for file in line.row.files],
        "overlay": line.row.overlay,
        "learning_rate": line.rate,
        "tried": [
            {"learning_rate": fit.rate, "validation": score, "failed": fit.failed, "run": str(fit.folder)}
            for fit, score in line.tried
        ],
        "runs": [
            {"run": str(fit.folder), "seed": fit.seed, "commits": fit.about["commits"], "hash": fit.about["hash"]}
            for fit in line.fits
        ],
        "failed": [{"run": str(fit.folder), "seed": fit.seed, "said": fit.failed} for fit in line.failed],
        "tasks": {task: scored(line.contestant.score(task)) for task in tasks},
        "mean": scored(line.contestant.mean()),
        "paired": None if line.paired is None else line.paired._asdict(),
        "adapter_parameters": line.row.parameters,
        "trainable_parameters": line.trainable,
        **line.stored._asdict(),
        "flops_per_token": flops,
        "step_rows": line.step_rows,
        "step_seconds": line.step_seconds,
        "peak_bytes": line.peak_bytes,
        "router": line.router,
    }
