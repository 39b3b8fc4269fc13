"""Bootstrap of metrics that are no row means: every resample at once.

Symbols: N rows, R resamples, C classes. A `Statistic` takes [R, N] row indices and gives [R] values.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]
Statistic = Callable[[IntArray], np.ndarray]

RESAMPLES = 1_000
CHUNK = 2_000_000
"""Numbers held at once per array; bounds the memory, does not change the result."""


def bootstrap(statistic: Statistic, n: int, cells: int = 1) -> np.ndarray:
    """Values of a statistic over resamples of the rows, drawn with replacement; always the same draws for the same n.

    Args:
        statistic: maps [R, N] row indices to [R] values.
        n: rows to draw from.
        cells: numbers that the statistic itself holds per resample.

    Returns:
        [1000] values; their standard deviation is the statistic's standard error.
    """
    generator = np.random.default_rng(0)
    step = max(1, CHUNK // max(n, cells))
    return np.concatenate(
        [
            statistic(generator.integers(0, n, size=(min(step, RESAMPLES - start), n)))
            for start in range(0, RESAMPLES, step)
        ]
    )


def confusion_statistic(guess: np.ndarray, gold: np.ndarray, classes: int, metric: str) -> Statistic:
    """Matthews correlation, F1 of class 1, or the mean F1 of the classes that occur.

    Args:
        guess: [N] predicted classes.
        gold: [N] true classes.
        classes: C.
        metric: "matthews", "f1" or "macro_f1".
    """

    def statistic(index: IntArray) -> np.ndarray:
        cell = gold[index] * classes + guess[index] + np.arange(len(index))[:, None] * classes**2
        confusion = np.bincount(cell.ravel(), minlength=len(index) * classes**2).reshape(-1, classes, classes)
        confusion = confusion.astype(np.float64)
        return _matthews(confusion) if metric == "matthews" else _f1(confusion, macro=metric == "macro_f1")

    return statistic


def correlation_statistic(guess: np.ndarray, gold: np.ndarray, by_rank: bool) -> Statistic:
    """Pearson correlation, or Spearman's (`by_rank`; ties share their mean rank, ranked anew in every resample)."""

    def statistic(index: IntArray) -> np.ndarray:
        x, y = guess[index], gold[index]
        constant = (np.ptp(x, axis=1) == 0) | (np.ptp(y, axis=1) == 0)  # centring a constant leaves rounding noise
        if by_rank:
            from scipy.stats import rankdata

            x, y = rankdata(x, axis=1), rankdata(y, axis=1)
        x, y = x - x.mean(1, keepdims=True), y - y.mean(1, keepdims=True)
        norm = np.sqrt((x * x).sum(1) * (y * y).sum(1))
        return _safe_ratio((x * y).sum(1), np.where(constant, 0, norm))

    return statistic


def _safe_ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Numerator over denominator; 0 where the denominator is 0 (a constant resample)."""
    return np.divide(numerator, denominator, out=np.zeros_like(numerator), where=denominator > 0)


def _f1(confusion: np.ndarray, macro: bool) -> np.ndarray:
    """[R] F1 from [R, C, C] counts, gold by row."""
    hits = np.diagonal(confusion, axis1=1, axis2=2)
    either = confusion.sum(1) + confusion.sum(2)
    per_class = _safe_ratio(2 * hits, either)
    if not macro:
        return per_class[:, 1]
    return _safe_ratio(per_class.sum(1), (either > 0).sum(1).astype(np.float64))


def _matthews(confusion: np.ndarray) -> np.ndarray:
    """[R] Matthews correlation from [R, C, C] counts, gold by row (Gorodkin's K-category form)."""
    guess, gold = confusion.sum(1), confusion.sum(2)
    total = guess.sum(1)
    covariance = np.trace(confusion, axis1=1, axis2=2) * total - (guess * gold).sum(1)
    return _safe_ratio(covariance, np.sqrt((total**2 - (guess * guess).sum(1)) * (total**2 - (gold * gold).sum(1))))
