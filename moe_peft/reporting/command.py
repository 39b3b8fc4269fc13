"""What tools/report.py does with the run folders it is given."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from moe_peft.reporting.comparison import check_alike
from moe_peft.reporting.comparison_page import write_comparison
from moe_peft.reporting.page import write_report
from moe_peft.reporting.run import Run


def report(
    folders: Sequence[Path],
    out: Path | None = None,
    rebuild: bool = False,
    rows: int | None = None,
    backbone: str | None = None,
) -> Path:
    """Writes one run's report, or the comparison of several.

    Args:
        folders: runs.
        out: the folder to write into; needed for several runs, the run's own where None.
        rebuild: record the runs' routing anew first, from their checkpoints.
        rows: of every task and split that are recorded at most; `record_run`'s own number where None.
        backbone: where the backbone's files lie on this machine, if not where they lay in training.

    Returns:
        The page.

    Raises:
        ValueError: a folder that is no run's, runs that cannot be compared, or no place to write.
    """
    if len(folders) > 1 and out is None:
        raise ValueError(f"out: {len(folders)} runs are compared; name the folder to write into with --out")
    for name, value in (("rows", rows), ("backbone", backbone)):
        if value is not None and not rebuild:
            raise ValueError(f"{name}: {value!r} is of use with --rebuild only; add it, or leave --{name} out")
    if rows is not None and rows < 1:
        raise ValueError(f"rows: {rows} is below 1; give the rows of every task to record")
    runs = [Run(folder) for folder in folders]
    check_alike(runs)
    if rebuild:
        from moe_peft.routing.rebuild import record_run
        from moe_peft.runs import find_checkpoint

        for folder in folders:  # all of them, before the first is recorded
            find_checkpoint(folder)
        record = record_run if rows is None else partial(record_run, rows_per_task=rows)
        for folder in folders:
            record(folder, backbone=backbone)
        runs = [Run(folder) for folder in folders]
    if len(runs) > 1:
        assert out is not None
        return write_comparison(runs, out)
    return write_report(runs[0], out)
