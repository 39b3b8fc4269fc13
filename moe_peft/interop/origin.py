"""What an export can know of the run that it comes from: its data, and the results of its test."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from moe_peft.data.encoding import EncodedRow
from moe_peft.data.module import MultitaskDataModule
from moe_peft.data.preview import load_data_module
from moe_peft.data.tasks import Split


class Origin(NamedTuple):
    """A run, as far as it is in reach."""

    data: MultitaskDataModule | None = None
    lacking: str = "no run is known"
    """Why there are no data."""
    results: dict[str, Any] | None = None
    """What a test of the checkpoint wrote."""

    def rows(self, split: Split, task: str | None, count: int) -> list[EncodedRow]:
        """Returns rows of a split, evenly spread over it.

        Args:
            split: the split.
            task: of which task; None: of each.
            count: at most so many of a task.

        Raises:
            ValueError: no data.
        """
        if self.data is None:
            raise ValueError(f"the run's rows are out of reach ({self.lacking}); name a whole run, whose data are here")
        names = [spec.name for spec in self.data.specs]
        found = []
        for number in range(len(names)) if task is None else [names.index(task)]:
            own = [row for row in self.data.rows(split) if row.task_id == number]
            found += spread(own, count)
        return found


def spread(rows: Sequence[EncodedRow], count: int) -> list[EncodedRow]:
    """Returns at most so many rows, evenly spaced: files are often sorted."""
    kept = min(count, len(rows))
    return [rows[at * len(rows) // kept] for at in range(kept)]


def origin_of(checkpoint: str | Path, tasks: Sequence[str], backbone: str | None = None) -> Origin:
    """Finds the run that a checkpoint belongs to.

    Args:
        checkpoint: a run's folder, or a checkpoint in it.
        tasks: the checkpoint's, which must be the run's.
        backbone: where the backbone's files lie, if not where they lay in training.
    """
    path = Path(checkpoint).absolute()
    folder = path if path.is_dir() else path.parent.parent
    config, results = folder / "config.yaml", _results(folder, path)
    if not config.is_file():
        return Origin(lacking=f"'{config}' is no file", results=results)
    moved = [] if backbone is None else [f"--model.init_args.backbone.init_args.name={backbone}"]
    try:
        data = load_data_module(["--config", str(config), *moved])
        found = [spec.name for spec in data.specs]
        if found != list(tasks):
            return Origin(lacking=f"'{config}' has tasks {found}", results=results)
        data.rows("validation")
    except (ValueError, OSError) as error:
        return Origin(lacking=str(error), results=results)
    return Origin(data, "", results)


def _results(folder: Path, checkpoint: Path) -> dict[str, Any] | None:
    """Reads what the test after the fit found, or a later one of this checkpoint; None where there is nothing whole.

    The fit tests its best checkpoint, or without one the last weights: no other has these results.
    """
    for name in ("results.json", f"results.test-{checkpoint.stem}.json"):
        try:
            found = json.loads((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if checkpoint == folder or Path(found.get("checkpoint") or "last.ckpt").name == checkpoint.name:
            return found
    return None
