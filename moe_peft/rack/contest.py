"""A comparison, resolved: the rows, where their fits lie, and which learning rate is chosen."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from jsonargparse import ArgumentError

from moe_peft.messages import one_line
from moe_peft.rack.fits import Fit
from moe_peft.rack.rows import MONITOR, Row, digest, in_one_word, resolve
from moe_peft.rack.settings import Comparison, read_comparison, slug
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


def prepare(file: Path, more: Sequence[str] = ()) -> Contest:
    """Reads and resolves a comparison; nothing is written.

    Args:
        file: its YAML.
        more: further arguments of the command line, for every fit.

    Raises:
        ValueError: whatever could not be run; one line.
    """
    comparison, more = read_comparison(file), in_one_word(more)
    budget = comparison.budget
    if budget is not None and not isinstance(budget, int):
        budget = resolve(comparison, budget._replace(sized=False), None, more).parameters
    rows = []
    for entry in comparison.entries:
        try:
            rows.append(resolve(comparison, entry, budget, more))
        except (ValueError, ArgumentError) as error:
            raise ValueError(f"methods: {entry.tag}: {one_line(str(error))}") from None
    contest = Contest(comparison, rows, budget, more)
    refuse_unlike(rows)
    refuse_other_tasks(contest)
    refuse_left_out(contest)
    return contest


def refuse_unlike(rows: Sequence[Row]) -> None:
    """Raises one line if rows differ in what is compared over: tasks, rows, base, or how options are ranked."""
    first = rows[0]
    for row in rows:
        if row.tasks != first.tasks:
            raise ValueError(
                f"methods: {row.tag} is of the tasks {', '.join(row.tasks)}, {first.tag} of {', '.join(first.tasks)}; "
                "compare over the same tasks"
            )
        if row.backbone != first.backbone:
            other = first.base if first.base != row.base else f"{first.base} with other arguments"
            raise ValueError(f"methods: {row.tag} is on {row.base}, {first.tag} on {other}; compare on one base")
        if row.ranking != first.ranking:
            raise ValueError(
                f"methods: {row.tag} ranks options by {row.ranking!r}, {first.tag} by {first.ranking!r}; give all rows "
                "one model.init_args.ranking"
            )
        if row.taken != first.taken:
            raise ValueError(
                f"methods: {row.tag} takes other rows of the tasks than {first.tag}; leave tasks' own arguments and "
                "trainer.limit_test_batches to the data's YAML, or to common"
            )


def refuse_left_out(contest: Contest) -> None:
    """Raises one line if a task cannot be left out, or a fit without it cannot be configured."""
    from moe_peft.rack.left_out import able, left_out  # which need what is above

    settings, tasks = contest.comparison.leave_one_out, contest.rows[0].tasks
    for task in (settings.tasks or tasks) if settings is not None else ():
        if task not in tasks or len(tasks) < 2:
            raise ValueError(
                f"leave_one_out.tasks: {task!r} cannot be left out of {', '.join(tasks)}; name one of several"
            )
    for row in able(contest) if settings is not None else ():
        try:
            next(left_out(contest, row, None))
        except (ValueError, ArgumentError) as error:
            raise ValueError(f"leave_one_out: {row.tag}: {one_line(str(error))}") from None


def refuse_other_tasks(contest: Contest) -> None:
    """Raises one line that names both lists if the folder has finished runs of other tasks."""
    here = contest.rows[0].tasks
    for file in sorted((contest.comparison.out / RUNS).glob("*/*/rack.json")):
        about = json.loads(file.read_text(encoding="utf-8"))
        if about.get("finished") and about["tasks"] != here:
            raise ValueError(
                f"tasks: '{file.parent}' is a finished run of {', '.join(about['tasks'])}, this comparison is of "
                f"{', '.join(here)}; name another folder (out)"
            )


def validation_score(fit: Fit) -> float | None:
    """The mean over tasks, on validation data, of the checkpoint that was tested; None where there is none."""
    results = read_results(fit.folder)[1] if fit.finished else None
    own = (results or {}).get("validation")
    return own["value"] if own is not None and own["name"] == MONITOR and math.isfinite(own["value"]) else None


def fits_of(contest: Contest, row: Row) -> list[Fit]:
    """All fits of a row that are known by now."""
    tried, chosen = contest.tried(row), contest.chosen(row)
    return tried if chosen is None else [*tried, *contest.repeated(row, chosen.rate)[1:]]
