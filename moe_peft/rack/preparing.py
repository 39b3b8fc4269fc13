"""A comparison is read and resolved, and all that could not be run refused, before anything is written."""

import json
from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentError

from moe_peft.messages import one_line
from moe_peft.rack.contest import RUNS, Contest
from moe_peft.rack.fits import ABOUT
from moe_peft.rack.left_out import able, left_out
from moe_peft.rack.rows import Row, in_one_word, resolve
from moe_peft.rack.settings import read_comparison


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
    for file in sorted((contest.comparison.out / RUNS).glob(f"*/*/{ABOUT}")):
        about = json.loads(file.read_text(encoding="utf-8"))
        if about.get("finished") and about["tasks"] != here:
            raise ValueError(
                f"tasks: '{file.parent}' is a finished run of {', '.join(about['tasks'])}, this comparison is of "
                f"{', '.join(here)}; name another folder (out)"
            )
