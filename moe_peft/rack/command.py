"""What tools/compare.py does: runs what is missing, one fit after another, then writes the tables."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean

from moe_peft.rack.contest import Contest, Say, fits_of, validation_score
from moe_peft.rack.fits import Fit
from moe_peft.rack.left_out import planned, run_left_out
from moe_peft.rack.lock import locked
from moe_peft.rack.rows import Row
from moe_peft.rack.tables import write_tables
from moe_peft.reporting.words import duration, many


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
        open_yet = not all(fit.finished or fit.failed for fit in contest.tried(row))
        later = len(contest.comparison.seeds) - 1 if open_yet else 0
        if later and contest.comparison.rates is not None:
            lines.append(f"{row.tag}, {many(later, 'further seed')} with the rate that is chosen: {about} each")
            total, count = total + later * (each or 0.0), count + later
    budget = "" if contest.budget is None else f"; budget {contest.budget:,} adapter parameters"
    sizes = [f"{row.tag}: {row.parameters:,} adapter parameters" for row in contest.rows]
    time = "" if not everything else f", about {duration(total)}"
    further = [] if contest.comparison.leave_one_out is None else [planned(contest)]
    return [*sizes, *lines, f"{many(count, 'fit')} to run{time}{budget}", *further]


def run_missing(contest: Contest, lock: int, say: Say) -> None:
    """Runs every fit that is not finished: the rates of each row on the first seed, then the other seeds.

    Args:
        contest: whose.
        lock: a file descriptor for the fits to hold.
        say: takes a line for every fit.

    Raises:
        ValueError: a fit has failed, and not because it diverged; or it has no validation score where one is needed.
    """
    for number, row in enumerate(contest.rows, start=1):
        for fit in contest.tried(row):
            refuse_unrated(contest, fit)
        for fit in missing(contest, row):
            fit.run(lock)
            refuse_unrated(contest, fit)
            score = validation_score(fit)
            what = f"validation {100 * score:.1f}" if score is not None else "done"
            what = f"diverged: {fit.failed}" if fit.failed else what
            say(f"[{number}/{len(contest.rows)}] {fit.name}: {what} ({duration(fit.about['seconds'])})")


def refuse_unrated(contest: Contest, fit: Fit) -> None:
    """Raises one line if a fit is finished and its learning rate cannot be told from others."""
    if contest.comparison.rates is not None and fit.finished and validation_score(fit) is None:
        raise ValueError(
            f"{fit.name}: there was no validation to choose a learning rate by; let the trainer validate, or leave "
            "learning_rates out"
        )


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


def compare(contest: Contest, say: Say = print) -> Path:
    """Runs what is missing of a comparison and writes its tables.

    Args:
        contest: the comparison.
        say: takes a line for every fit.

    Returns:
        The page.

    Raises:
        ValueError: whatever cannot be run; one line.
        KeyboardInterrupt: told to end; the same call goes on.
    """
    out = contest.comparison.out
    with locked(out) as lock, told_to_end():
        run_missing(contest, lock, say)
        page = write_tables(contest, out)
        if contest.comparison.leave_one_out is not None:
            run_left_out(contest, lock, say)
    return page
