"""The rank table task x linear of MoRE: its history as CSV while training, its picture at the end."""

import csv
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer

from moe_peft.methods.more import MoRE


class RankReport(Callback):
    """Writes <run>/routing/rank_history.csv after every validation; ranks.csv and ranks.png at the end of a fit.

    The table is read off the weights alone (`MoRE.rank_table`), so a checkpoint holds all of it. The final table is
    that of the weights which the fit's own test reports; without such a test, that of the last step.
    """

    def __init__(self) -> None:
        self._fitted = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuses a method without ranks to choose.

        Raises:
            ValueError: the method is not MoRE.
        """
        if not isinstance(pl_module, MoRE):
            raise ValueError(f"RankReport: {type(pl_module).__name__} has no ranks to choose; remove the callback")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Drops what an interrupted fit wrote after the checkpoint that this one goes on from."""
        self._fitted = True
        file = self._folder(trainer) / "rank_history.csv" if self._writes(trainer) else None
        if file is not None and file.exists():
            with file.open(newline="", encoding="utf-8") as lines:
                header, *rows = csv.reader(lines)
            write_csv(file, header, [tuple(row) for row in rows if int(row[0]) <= trainer.global_step])

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Appends the table of this step (step, task, linear, rank)."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        assert isinstance(pl_module, MoRE)
        table = pl_module.rank_table()  # on every rank: a sharded one is gathered
        if not self._writes(trainer):
            return
        rows = [
            (trainer.global_step, spec.name, slot, rank)
            for slot, ranks in table.items()
            for spec, rank in zip(pl_module.specs, ranks, strict=True)
        ]
        file = self._folder(trainer) / "rank_history.csv"
        write_csv(file, [] if file.exists() else ["step", "task", "linear", "rank"], rows, append=True)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the table beside the one that training began with, and draws it."""
        self._write_table(trainer, pl_module)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes it again after the fit's own test, which may have loaded a better checkpoint than the last."""
        if self._fitted:
            self._write_table(trainer, pl_module)

    def _write_table(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, MoRE)
        now, start = pl_module.rank_table(), pl_module.rank_table(start=True)
        if not self._writes(trainer):
            return
        tasks = [spec.name for spec in pl_module.specs]
        rows = [(task, slot, start[slot][t], now[slot][t]) for t, task in enumerate(tasks) for slot in now]
        folder = self._folder(trainer)
        write_csv(folder / "ranks.csv", ["task", "linear", "start", "rank"], rows)
        draw_ranks(folder / "ranks.png", tasks, now, pl_module.rank)

    @staticmethod
    def _writes(trainer: Trainer) -> bool:
        return trainer.is_global_zero and not trainer.fast_dev_run  # type: ignore[attr-defined]

    @staticmethod
    def _folder(trainer: Trainer) -> Path:
        folder = Path(trainer.default_root_dir) / "routing"
        folder.mkdir(parents=True, exist_ok=True)
        return folder


def write_csv(path: Path, header: list[str], rows: list[tuple], append: bool = False) -> None:
    """Writes (or appends) rows below a header, which may be empty."""
    with path.open("a" if append else "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows] if header else rows)


def draw_ranks(path: Path, tasks: list[str], table: dict[str, list[int]], rank: int) -> None:
    """Draws the rank table as a heat map.

    Args:
        path: the PNG to write.
        tasks: T names, the rows.
        table: [T] ranks by linear, the columns.
        rank: r, the end of the colour scale.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    slots = list(table)
    figure = Figure(figsize=(2.5 + 0.16 * len(slots), 2.2 + 0.3 * len(tasks)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    image = axes.imshow([[table[slot][t] for slot in slots] for t in range(len(tasks))], "viridis", vmin=1, vmax=rank)
    axes.set_aspect("auto")
    axes.set_yticks(range(len(tasks)), tasks)
    axes.set_xticks(range(len(slots)), slots, rotation=90, fontsize=6)
    axes.set_title("rank chosen per task and adapted linear")
    figure.colorbar(image, ax=axes, label="rank", ticks=range(1, rank + 1) if rank <= 16 else None)
    figure.savefig(path, dpi=120)
