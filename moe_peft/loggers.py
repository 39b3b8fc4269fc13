"""metrics.csv in long form: one line per number, so that a file can be appended to for ever."""

import csv
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.trainer.states import TrainerFn

HEADER = ["step", "epoch", "name", "value"]


class MetricsCSV(Logger):
    """Writes `<save_dir>/metrics.csv` with the columns step, epoch, name, value.

    Every call is on the disk when it returns: a killed run loses nothing, and there is nothing to flush. A wide table,
    as other loggers write it, is one line of pandas:

        pandas.read_csv("metrics.csv").pivot_table(index="step", columns="name", values="value")

    A resumed fit goes on where its checkpoint was made: rows of later steps, left by the interrupted process, are
    dropped once, so no step is in the file twice. A fit from scratch in a folder that has a metrics.csv moves the old
    one to metrics.1.csv (2, 3, ...). `test` or `validate` alone writes nothing: its numbers are in the results files.

    Args:
        save_dir: The run folder; checkpoints go to `<save_dir>/checkpoints` if this is the trainer's first logger.
    """

    def __init__(self, save_dir: str) -> None:
        super().__init__()
        self._save_dir = save_dir
        self._silent = False
        self._pending_fit: str | None = None
        self._resumed_at: tuple[int, set[str]] = (-1, set())

    @property
    def name(self) -> str:
        """Empty: the run folder itself, with no folder of its own for the logger."""
        return ""

    @property
    def version(self) -> str:
        """Empty, see `name`."""
        return ""

    @property
    def save_dir(self) -> str:
        """The run folder."""
        return self._save_dir

    @property
    def root_dir(self) -> str:
        """The run folder."""
        return self._save_dir

    @property
    def log_dir(self) -> str:
        """The run folder."""
        return self._save_dir

    @property
    def path(self) -> Path:
        """The file."""
        return Path(self._save_dir) / "metrics.csv"

    def log_hyperparams(self, params: object, *args: Any, **kwargs: Any) -> None:
        """Does nothing: config.yaml has them."""

    def log_graph(self, model: LightningModule, input_array: object = None) -> None:  # type: ignore[override]
        """Draws no graph. Lightning calls this at the start of every run: the one moment a logger sees its trainer."""
        if model.trainer.state.fn == TrainerFn.FITTING:
            self._silent, self._pending_fit = False, "resume" if model.trainer.ckpt_path else "fresh"
        elif self._pending_fit is None and self._resumed_at[0] < 0:
            self._silent = True

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Appends one row per metric.

        Raises:
            OSError: the file cannot be written; one line that names it.
        """
        if self._silent or not metrics:
            return
        step = 0 if step is None else step
        epoch = metrics.get("epoch", "")
        try:
            if self._pending_fit is not None:
                self._start_fit(step, resumed=self._pending_fit == "resume")
                self._pending_fit = None
            start, present = self._resumed_at
            names = [name for name in metrics if name != "epoch" and not (step == start and name in present)]
            self._append([[step, epoch, name, repr(float(metrics[name]))] for name in names])
        except OSError as error:
            raise OSError(
                f"cannot write {self.path} ({error.strerror}): free the disk or choose another run folder, then resume "
                "from the last checkpoint"
            ) from None

    def _append(self, rows: list[list[Any]]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            if file.tell() == 0:
                writer.writerow(HEADER)
            writer.writerows(rows)

    def _start_fit(self, step: int, resumed: bool) -> None:
        """Makes the file end where the fit begins; `step` is the first one that the fit logs.

        Rows of that very step stay, and are not written again: an interrupted process may have logged some of them
        before it saved the checkpoint.
        """
        self._resumed_at = (step, set())
        if not self.path.exists():
            return
        if not resumed:
            number = next(n for n in range(1, 1_000_000) if not self.path.with_name(f"metrics.{n}.csv").exists())
            self.path.rename(self.path.with_name(f"metrics.{number}.csv"))
            return
        with self.path.open(newline="") as file:
            next(file, None)
            # A killed process may leave half a row at the end.
            rows = list(csv.reader(line for line in file if line.endswith("\n")))
        kept = [row for row in rows if int(row[0]) <= step]
        self._resumed_at = (step, {row[2] for row in kept if int(row[0]) == step})
        temporary = self.path.with_name(f"metrics.csv.{os.getpid()}")
        with temporary.open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([HEADER, *kept])
        temporary.replace(self.path)
