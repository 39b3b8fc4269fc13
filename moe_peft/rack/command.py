"""What tools/compare.py does: runs what is missing, one fit after another, then writes the tables."""

import json
import math
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from jsonargparse import ArgumentError

from moe_peft.messages import one_line
from moe_peft.rack.fits import Fit
from moe_peft.rack.lock import locked
from moe_peft.rack.rows import Row, digest, resolve
from moe_peft.rack.settings import Comparison, read_comparison, slug
from moe_peft.reporting.run import Run
from moe_peft.reporting.words import duration, many

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
        return Fit(row, seed, rate, self.comparison.out / RUNS / slug(row.tag) / name, self.more)

    def tried(self, row: Row) -> list[Fit]:
        """The fits of the first seed, one for every learning rate."""
        return [self.fit(row, self.comparison.seeds[0], rate) for rate in self.comparison.rates or [None]]

    def chosen(self, row: Row) -> Fit | None:
        """The first seed's fit with the best validation; None while one is to be run, or where all have diverged."""
        tried = self.tried(row)
        if not all(fit.finished or fit.failed for fit in tried):
            return None
        scores = [(score, -at) for at, fit in enumerate(tried) if (score := validation_score(fit)) is not None]
        return tried[-max(scores)[1]] if scores else None

    def repeated(self, row: Row, rate: float | None) -> list[Fit]:
        """The fits of all seeds with one learning rate."""
        return [self.fit(row, seed, rate) for seed in self.comparison.seeds]


def prepare(file: Path, more: Sequence[str] = ()) -> Contest:
    """Reads and resolves a comparison; nothing is written.

    Args:
        file: its YAML.
        more: further arguments of the command line, for every fit.

    Raises:
        ValueError: whatever could not be run; one line.
    """
    comparison = read_comparison(file)
    budget = comparison.budget
    if budget is not None and not isinstance(budget, int):
        budget = resolve(comparison, budget._replace(sized=False), None, more).parameters
    rows = []
    for entry in comparison.entries:
        try:
            rows.append(resolve(comparison, entry, budget, more))
        except (ValueError, ArgumentError) as error:
            raise ValueError(f"methods: {entry.tag}: {one_line(str(error))}") from None
    contest = Contest(comparison, rows, budget, tuple(more))
    refuse_other_tasks(contest)
    return contest


def refuse_other_tasks(contest: Contest, runs: Path | None = None) -> None:
    """Refuses rows of different tasks, and a folder whose finished runs are of others.

    Args:
        contest: whose rows.
        runs: the folder; the comparison's own where not given.

    Raises:
        ValueError: names both lists.
    """
    here = contest.rows[0].tasks
    for row in contest.rows:
        if row.tasks != here:
            raise ValueError(
                f"methods: {row.tag} is of the tasks {', '.join(row.tasks)}, {contest.rows[0].tag} of "
                f"{', '.join(here)}; compare over the same tasks"
            )
    for file in sorted((runs or contest.comparison.out / RUNS).glob("*/*/rack.json")):
        there = json.loads(file.read_text(encoding="utf-8"))["tasks"]
        if (file.parent / "results.json").is_file() and there != here:
            raise ValueError(
                f"tasks: '{file.parent}' is a finished run of {', '.join(there)}, this comparison is of "
                f"{', '.join(here)}; name another folder (out)"
            )


def validation_score(fit: Fit) -> float | None:
    """The best mean over tasks that a fit had on validation data; None for one that diverged."""
    if not fit.finished:
        return None
    found = [metric.value for metric in Run(fit.folder).history("val/mean") if math.isfinite(metric.value)]
    return max(found, default=None)


def plan(contest: Contest) -> list[str]:
    """Says what would be run, and how long it would take by what has been run."""
    known = {row.tag: [fit.about["seconds"] for fit in fits_of(contest, row) if fit.finished] for row in contest.rows}
    everything = [seconds for own in known.values() for seconds in own]
    lines, total, count = [], 0.0, 0
    for row in contest.rows:
        each = fmean(known[row.tag] or everything) if everything else None
        about = "no estimate before a first run" if each is None else f"about {duration(each)}"
        for fit in fits_of(contest, row):
            if not (fit.finished or fit.failed):
                lines.append(f"{fit.name}: {'goes on' if fit.resumable else 'to be run'}, {about}")
                total, count = total + (each or 0.0), count + 1
        later = len(contest.comparison.seeds) - 1 if contest.chosen(row) is None else 0
        if later and contest.comparison.rates is not None:
            lines.append(f"{row.tag}, {many(later, 'further seed')} with the rate that is chosen: {about} each")
            total, count = total + later * (each or 0.0), count + later
    budget = "" if contest.budget is None else f"; budget {contest.budget:,} adapter parameters"
    sizes = [f"{row.tag}: {row.parameters:,} adapter parameters" for row in contest.rows]
    time = "" if not everything else f", about {duration(total)}"
    return [*sizes, *lines, f"{many(count, 'fit')} to run{time}{budget}"]


def fits_of(contest: Contest, row: Row) -> list[Fit]:
    """All fits of a row that are known by now."""
    tried, chosen = contest.tried(row), contest.chosen(row)
    if contest.comparison.rates is None:
        return contest.repeated(row, None)
    return tried if chosen is None else [*tried, *contest.repeated(row, chosen.rate)[1:]]


def run_missing(contest: Contest, lock: int, say: Say) -> None:
    """Runs every fit that is not finished: the rates of each row on the first seed, then the other seeds.

    Args:
        contest: whose.
        lock: a file descriptor for the fits to hold.
        say: takes a line for every fit.

    Raises:
        ValueError: a fit has failed, and not because it diverged.
    """
    for number, row in enumerate(contest.rows, start=1):
        for fit in missing(contest, row):
            fit.run(lock)
            score = validation_score(fit)
            what = f"diverged: {fit.failed}" if score is None else f"validation {100 * score:.1f}"
            say(f"[{number}/{len(contest.rows)}] {fit.name}: {what} ({duration(fit.about['seconds'])})")


def missing(contest: Contest, row: Row) -> Iterator[Fit]:
    """Yields the fits of a row that are not finished; those of the later seeds once the rate is known."""
    for stage in (contest.tried, lambda row: fits_of(contest, row)):
        for fit in stage(row):
            if not (fit.finished or fit.failed):
                yield fit


@contextmanager
def told_to_end() -> Iterator[None]:
    """Within: SIGTERM is what Ctrl-C is."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def compare(file: Path, more: Sequence[str] = (), say: Say = print) -> Path:
    """Runs what is missing of a comparison and writes its tables.

    Args:
        file: its YAML.
        more: further arguments of the command line, for every fit.
        say: takes a line for every fit.

    Returns:
        The page.

    Raises:
        ValueError: whatever cannot be run; one line.
        KeyboardInterrupt: told to end; the same call goes on.
    """
    from moe_peft.rack.left_out import run_left_out
    from moe_peft.rack.tables import write_tables

    contest = prepare(file, more)
    out = contest.comparison.out
    with locked(out) as lock, told_to_end():
        run_missing(contest, lock, say)
        page = write_tables(contest, out)
        if contest.comparison.leave_one_out is not None:
            run_left_out(contest, lock, say)
    return page
