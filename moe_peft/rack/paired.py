"""Differences between two methods on the same test rows, over seeds.

    D = mean over seeds s of d_s,   d_s = mean over tasks of (the method's score - the reference's with that seed)
    SE(D)² = SE_rows² + SE_seeds²
    SE_rows²  = Σ_t SE_t² / T²: SE_t is the standard error, over the rows of task t, of the seeds' mean difference (of
                row scores, or for F1, Matthews and the like by a bootstrap that draws the same rows for all)
    SE_seeds² = variance of d_s over seeds (n - 1) / number of seeds; not known, and left out, for one seed

The two parts share what differs by row and seed at once, so that SE(D) is rather too large than too small.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, variance
from typing import NamedTuple

from moe_peft.data.tasks import TaskSpec
from moe_peft.paired_metrics import PairedScore, paired_scores
from moe_peft.predictions import Prediction, Ranking

Predictions = list[Prediction]
ANSWERS = "answers.json"
"""The answers of a fit that came out of an archive (see `rack.archive`)."""


class Paired(NamedTuple):
    """How much better a method is than the reference."""

    difference: float
    stderr: float
    rows_stderr: float
    seeds_stderr: float | None
    """None for a single seed."""
    seeds: int
    tasks: dict[str, float]


def paired(specs: Sequence[TaskSpec], pairs: Sequence[tuple[Predictions, Predictions]], ranking: Ranking) -> Paired:
    """Compares a method with the reference.

    Args:
        specs: the tasks.
        pairs: the predictions of both, for every seed that both have.
        ranking: how options are ranked.

    Raises:
        ValueError: predictions of different rows.
    """
    whole = paired_scores(specs, pairs, ranking)
    rows = math.hypot(*(own.stderr for own in whole.values())) / len(whole)
    by_seed = [mean_of(paired_scores(specs, [pair], ranking)) for pair in pairs]
    seeds = math.sqrt(variance(by_seed) / len(by_seed)) if len(by_seed) > 1 else None
    tasks = {task: own.difference for task, own in whole.items()}
    return Paired(mean_of(whole), math.hypot(rows, seeds or 0.0), rows, seeds, len(pairs), tasks)


def mean_of(scores: dict[str, PairedScore]) -> float:
    """The mean difference over tasks."""
    return fmean(own.difference for own in scores.values())


def read_answers(run: Path) -> Predictions:
    """Reads what a run has answered on its test rows; where only the choices were kept, the scores are one-hot."""
    kept = run / ANSWERS
    if kept.is_file():
        columns = json.loads(kept.read_text(encoding="utf-8"))
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        return [Prediction(scores=one_hot(row.pop("choice"), row.pop("options")), chars=(), **row) for row in rows]
    lines = (run / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    return [Prediction.from_json(line) for line in lines]


def one_hot(choice: int | None, options: int) -> tuple[float, ...]:
    """Scores that mean this choice; () where there are no options."""
    return tuple(float(option == choice) for option in range(options))
