"""The metric that belongs to each task, of the predictions of an evaluation, and its standard error.

A metric is either a mean of row scores (accuracy, exact_match, token_f1) or a statistic of all rows together (matthews,
f1, pearson, spearman). Point estimates of the latter come from torchmetrics; their standard errors from a seeded
bootstrap whose 1,000 resamples are computed at once (moe_peft/statistics.py), which torchmetrics cannot do.
Values are fractions (0.62, not 62); no function here returns NaN: constant predictions or a constant gold give
matthews, pearson and spearman 0.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import torch
from torchmetrics.functional.classification import (
    binary_f1_score,
    binary_matthews_corrcoef,
    multiclass_f1_score,
    multiclass_matthews_corrcoef,
)
from torchmetrics.functional.regression import pearson_corrcoef, spearman_corrcoef

from moe_peft.data.tasks import TaskSpec
from moe_peft.predictions import Prediction, Ranking
from moe_peft.statistics import Statistic, bootstrap, confusion_statistic, correlation_statistic

T = TypeVar("T")

MEAN_METRICS = ("accuracy", "exact_match", "token_f1")
"""Metrics that are means of row scores; the others are statistics of all rows together."""


@dataclass(frozen=True, slots=True)
class TaskScore:
    """Value of a task's primary metric (a fraction), its standard error, the number of rows, other metrics' values."""

    metric: str
    value: float
    stderr: float
    n: int
    beside: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a results table. `mean` and `stderr` are None where the line misses tasks that others have."""

    mean: float | None
    stderr: float | None
    tasks: dict[str, TaskScore]


def score_task(spec: TaskSpec, predictions: Sequence[Prediction], ranking: Ranking) -> TaskScore:
    """Scores one task by the metric that belongs to it.

    f1 is the F1 of class 1 for two classes; for more, and as macro_f1, the mean over the classes that occur. Constant
    predictions or a constant gold give matthews, pearson and spearman 0. A regression text that holds no number counts
    as 0. Texts are compared lower-cased, without articles and without punctuation around words.

    Args:
        spec: the task.
        predictions: all of this task.
        ranking: how options are ranked.

    Returns:
        The score; its standard error is binomial for accuracy and exact_match, bootstrap for the others.

    Raises:
        ValueError: there are no predictions, or a row has no gold answer.
    """
    if not predictions:
        raise ValueError(f"task '{spec.name}': predictions=[] cannot be scored; give the split at least one row")
    (metric, value), *others = [(name, _value(spec, name, predictions, ranking)) for name in spec.metric.split("/")]
    error = _standard_error(spec, metric, value, predictions, ranking)
    return TaskScore(metric, value, error, len(predictions), dict(others))


def score_row(specs: Sequence[TaskSpec], predictions: Sequence[Prediction], ranking: Ranking) -> Row:
    """Scores every task that has predictions; the mean is over tasks, its error assumes that tasks are independent.

    Raises:
        ValueError: there are no predictions at all, or a row id occurs twice.
    """
    groups = by_task(specs, predictions)
    tasks = {specs[task].name: score_task(specs[task], list(rows.values()), ranking) for task, rows in groups.items()}
    mean = sum(score.value for score in tasks.values()) / len(tasks)
    return Row(mean, math.hypot(*(score.stderr for score in tasks.values())) / len(tasks), tasks)


def normalise_answer(text: str) -> str:
    """Lower case, no punctuation around words (`-5` and `3.5` stay), no articles unless there is nothing else."""
    words = [word for word in (word.strip(".,;:!?\"'`()[]{}") for word in text.lower().split()) if word]
    return " ".join([word for word in words if word not in ("a", "an", "the")] or words)


def by_task(specs: Sequence[TaskSpec], predictions: Sequence[Prediction]) -> dict[int, dict[str, Prediction]]:
    """Rows by id under their task's index, tasks in the order of `specs`."""
    if not predictions:
        raise ValueError("predictions=[] cannot be scored; give the split at least one row")
    groups: dict[int, dict[str, Prediction]] = {task: {} for task in range(len(specs))}
    for row in predictions:
        if row.row_id in groups[row.task]:
            raise ValueError(f"row '{row.row_id}' occurs twice in predictions; give every row of a split its own id")
        groups[row.task][row.row_id] = row
    return {task: rows for task, rows in groups.items() if rows}


def _gold(row: Prediction, gold: T | None) -> T:
    if gold is None:
        raise ValueError(f"row '{row.row_id}' has no gold answer; score a labelled split, or use predict")
    return gold


def _token_f1(guess: str, gold: str) -> float:
    guess_words, gold_words = normalise_answer(guess).split(), normalise_answer(gold).split()
    if not guess_words or not gold_words:
        return float(guess_words == gold_words)
    common = sum((Counter(guess_words) & Counter(gold_words)).values())
    return 2 * common / (len(guess_words) + len(gold_words))


def _value(spec: TaskSpec, metric: str, predictions: Sequence[Prediction], ranking: Ranking) -> float:
    if metric in MEAN_METRICS:
        return float(row_scores(metric, predictions, ranking).mean())
    return point_estimate(metric, *guess_and_gold(spec, predictions, ranking))


def _standard_error(
    spec: TaskSpec, metric: str, value: float, predictions: Sequence[Prediction], ranking: Ranking
) -> float:
    n = len(predictions)
    if metric in ("accuracy", "exact_match"):
        return math.sqrt(value * (1 - value) / n)
    if metric == "token_f1":
        scores = row_scores(metric, predictions, ranking)
        return float(bootstrap(lambda index: scores[index].mean(1), n).std(ddof=1))
    guess, gold, classes = guess_and_gold(spec, predictions, ranking)
    return float(bootstrap(statistic_of(metric, guess, gold, classes), n, classes * classes).std(ddof=1))


def row_scores(metric: str, predictions: Sequence[Prediction], ranking: Ranking) -> np.ndarray:
    """[N] score of each row under a mean metric."""
    match metric:
        case "accuracy":
            scores = [row.choice(ranking) == _gold(row, row.label) for row in predictions]
        case "exact_match":
            scores = [
                normalise_answer(row.text or "") == normalise_answer(_gold(row, row.target)) for row in predictions
            ]
        case _:
            scores = [_token_f1(row.text or "", _gold(row, row.target)) for row in predictions]
    return np.asarray(scores, dtype=np.float64)


def guess_and_gold(
    spec: TaskSpec, predictions: Sequence[Prediction], ranking: Ranking
) -> tuple[np.ndarray, np.ndarray, int]:
    """[N] answers, [N] gold, and the number of classes (1 for regression)."""
    if spec.kind == "regression":
        values = [math.nan if row.predicted_value is None else row.predicted_value for row in predictions]
        guess = np.asarray(values, dtype=np.float64)
        guess[~np.isfinite(guess)] = 0.0
        return guess, np.asarray([_gold(row, row.value) for row in predictions], dtype=np.float64), 1
    classes = len(spec.choices) or max(len(row.scores) for row in predictions)
    guess = np.asarray([row.choice(ranking) for row in predictions], dtype=np.int64)
    return guess, np.asarray([_gold(row, row.label) for row in predictions], dtype=np.int64), classes


def point_estimate(metric: str, guess: np.ndarray, gold: np.ndarray, classes: int) -> float:
    """The value of a metric that is no mean of row scores; arguments are what `guess_and_gold` gives."""
    if "f1" not in metric and (np.ptp(guess) == 0 or np.ptp(gold) == 0):
        return 0.0
    preds, target = torch.from_numpy(guess), torch.from_numpy(gold)
    match metric:
        case "f1" if classes == 2:
            value = binary_f1_score(preds, target)
        case "f1" | "macro_f1":
            value = multiclass_f1_score(preds, target, num_classes=classes, average="macro")
        case "matthews" if classes == 2:
            value = binary_matthews_corrcoef(preds, target)
        case "matthews":
            value = multiclass_matthews_corrcoef(preds, target, num_classes=classes)
        case "pearson":
            value = pearson_corrcoef(preds, target)
        case _:
            value = spearman_corrcoef(preds, target)
    return float(value)


def statistic_of(metric: str, guess: np.ndarray, gold: np.ndarray, classes: int) -> Statistic:
    """The same for many resamples of the rows at once."""
    if metric in ("pearson", "spearman"):
        return correlation_statistic(guess, gold, by_rank=metric == "spearman")
    if metric == "f1" and classes > 2:
        metric = "macro_f1"
    return confusion_statistic(guess, gold, classes, metric)
