"""A comparison, resolved: the rows, where their fits lie, and which learning rate is chosen."""

import math
from collections.abc import Callable
from typing import NamedTuple

from moe_peft.rack.fits import Fit
from moe_peft.rack.rows import MONITOR, Row, digest
from moe_peft.rack.settings import Comparison, slug
from moe_peft.reporting.run import read_results

RUNS = "runs"
Say = Callable[[str], None]


class Contest(NamedTuple):
    """A comparison, resolved: the rows, and where the fits lie."""

    comparison: Comparison
    rows: list[Row]
    budget: int | None
    more: tuple[str, ...]

    def fit(self, row: Row, seed: int, rate: float | None) -> Fit:
        """Returns one of a row's fits."""
        rated = "" if rate is None else f"-lr{rate:g}"
        name = f"seed{seed}{rated}-{digest(row, seed, rate)[:8]}"
        runs = self.comparison.out / RUNS
        folder = runs / slug(row.tag) / name
        if not folder.exists():  # unless its row had another tag
            folder = next(runs.glob(f"*/{name}"), folder)
        return Fit(row, seed, rate, folder, self.more)

    def tried(self, row: Row) -> list[Fit]:
        """The fits of the first seed, one for every learning rate."""
        return [self.fit(row, self.comparison.seeds[0], rate) for rate in self.comparison.rates or [None]]

    def chosen(self, row: Row) -> Fit | None:
        """The first seed's fit with the best validation; None while one is to be run, or where all have diverged.

        Where there is no rate to choose, it is the first seed's, however far that is.
        """
        tried = self.tried(row)
        if self.comparison.rates is None:
            return tried[0]
        if not all(fit.finished or fit.failed for fit in tried):
            return None
        scores = [(score, -at) for at, fit in enumerate(tried) if (score := validation_score(fit)) is not None]
        return tried[-max(scores)[1]] if scores else None

    def repeated(self, row: Row, rate: float | None) -> list[Fit]:
        """The fits of all seeds with one learning rate."""
        return [self.fit(row, seed, rate) for seed in self.comparison.seeds]

    def diverged(self, row: Row) -> bool:
        """Whether all fits of a row have: of every rate, or of every seed where there is no rate to choose."""
        fits = self.repeated(row, None) if self.comparison.rates is None else self.tried(row)
        return all(fit.failed for fit in fits)


def validation_score(fit: Fit) -> float | None:
    """The mean over tasks, on validation data, of the checkpoint that was tested; None where there is none."""
    results = read_results(fit.folder)[1] if fit.finished else None
    own = (results or {}).get("validation")
    return own["value"] if own is not None and own["name"] == MONITOR and math.isfinite(own["value"]) else None


def fits_of(contest: Contest, row: Row) -> list[Fit]:
    """All fits of a row that are known by now."""
    tried, chosen = contest.tried(row), contest.chosen(row)
    return tried if chosen is None else [*tried, *contest.repeated(row, chosen.rate)[1:]]
