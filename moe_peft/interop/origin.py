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
    """The content of results.json."""

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
    path = Path(checkpoint)
    folder = path if path.is_dir() else path.parent.parent
    config = folder / "config.yaml"
    if not config.is_file():
        return Origin(lacking=f"'{config}' is no file", results=_results(folder))
    moved = [] if backbone is None else [f"--model.init_args.backbone.init_args.name={backbone}"]
    try:
        data = load_data_module(["--config", str(config), *moved])
        found = [spec.name for spec in data.specs]
        if found != list(tasks):
            return Origin(lacking=f"'{config}' has tasks {found}", results=_results(folder))
        data.rows("validation")
    except (ValueError, OSError) as error:
        return Origin(lacking=str(error), results=_results(folder))
    return Origin(data, "", _results(folder))


def _results(folder: Path) -> dict[str, Any] | None:
    """Reads the results of the test that followed the fit; None where there are none, or no whole ones."""
    try:
        return json.loads((folder / "results.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
