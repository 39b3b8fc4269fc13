"""Differences of two models on the same rows, and their standard errors."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moe_peft.data.tasks import TaskSpec
from moe_peft.metrics import MEAN_METRICS, by_task, guess_and_gold, point_estimate, row_scores, statistic_of
from moe_peft.predictions import Prediction, Ranking
from moe_peft.statistics import IntArray, bootstrap


@dataclass(frozen=True, slots=True)
class PairedScore:
    """Difference of two models on the rows of one task, and its standard error over the rows."""

    difference: float
    stderr: float


def paired_difference(
    specs: Sequence[TaskSpec], a: Sequence[Prediction], b: Sequence[Prediction], ranking: Ranking
) -> tuple[float, float]:
    """How much better a is than b on the same rows.

    Args:
        specs: the tasks.
        a: predictions of one model.
        b: predictions of the other, in any order.
        ranking: how options are ranked.

    Returns:
        The macro mean of a minus that of b, and the standard error of this difference: from the per-row differences
        for mean metrics, from a bootstrap that draws the same rows for both otherwise.

    Raises:
        ValueError: a and b are not about the same rows.
    """
    found = paired_scores(specs, [(a, b)], ranking).values()
    return sum(own.difference for own in found) / len(found), math.hypot(*(own.stderr for own in found)) / len(found)


def paired_scores(
    specs: Sequence[TaskSpec], pairs: Sequence[tuple[Sequence[Prediction], Sequence[Prediction]]], ranking: Ranking
) -> dict[str, PairedScore]:
    """How much better one model is than another on the same rows, by task, as a mean over repetitions.

    Args:
        specs: the tasks.
        pairs: predictions of both models, in any order, for every repetition (seed).
        ranking: how options are ranked.

    Raises:
        ValueError: predictions that are not all about the same rows.
    """
    groups = [by_task(specs, side) for pair in pairs for side in pair]
    found = {}
    for task in dict.fromkeys(task for group in groups for task in group):
        sides = [group.get(task, {}) for group in groups]
        for side in sides:
            if odd := sorted(side.keys() ^ sides[0].keys()):
                raise ValueError(
                    f"a and b hold different rows of task '{specs[task].name}': {len(odd)} in one only, first "
                    f"'{odd[0]}'; compare predictions of the same split"
                )
        rows = [[side[key] for key in sides[0]] for side in sides]
        found[specs[task].name] = _paired_task(specs[task], rows[::2], rows[1::2], ranking)
    return found


def _paired_task(
    spec: TaskSpec, a: Sequence[Sequence[Prediction]], b: Sequence[Sequence[Prediction]], ranking: Ranking
) -> PairedScore:
    """Mean difference over repetitions and its standard error on one task; a[s][i] and b[s][i] are the same row."""
    metric, n = spec.primary_metric, len(a[0])
    if metric in MEAN_METRICS:
        pairs = zip(a, b, strict=True)
        own = [row_scores(metric, one, ranking) - row_scores(metric, other, ranking) for one, other in pairs]
        differences = np.mean(own, axis=0)
        return PairedScore(float(differences.mean()), float(differences.std()) / math.sqrt(n))
    sides = [[guess_and_gold(spec, one, ranking) for one in side] for side in (a, b)]
    values = [np.mean([point_estimate(metric, *one) for one in side]) for side in sides]
    statistics = [[statistic_of(metric, *one) for one in side] for side in sides]

    def difference(index: IntArray) -> np.ndarray:
        means = [np.mean([statistic(index) for statistic in side], axis=0) for side in statistics]
        return means[0] - means[1]

    resampled = bootstrap(difference, n, sides[0][0][2] ** 2)
    return PairedScore(float(values[0] - values[1]), float(resampled.std(ddof=1)))
