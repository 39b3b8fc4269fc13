"""Where the rows of a test were routed: a confusion matrix of tasks and experts, as CSV and picture."""

from collections import Counter
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer

from moe_peft.callbacks.rank_report import write_csv
from moe_peft.methods.evaluation import confusion
from moe_peft.methods.tt_lora_moe import TTLoRAMoE
from moe_peft.predictions import NOBODY


class RoutingConfusion(Callback):
    """Writes `<run>/routing/confusion.csv` and `.png` after a test by the learned router: rows by task and expert."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuses a method without a router for whole inputs."""
        if not isinstance(pl_module, TTLoRAMoE):
            raise ValueError(f"RoutingConfusion: {type(pl_module).__name__} routes no whole inputs; drop this callback")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes both, on rank zero."""
        assert isinstance(pl_module, TTLoRAMoE)
        if not pl_module.routes or not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        table = confusion(pl_module.specs, pl_module.predictions["model"])
        names = [*table, NOBODY] if any(NOBODY in own for own in table.values()) else [*table]
        folder = Path(trainer.default_root_dir) / "routing"
        folder.mkdir(parents=True, exist_ok=True)
        write_csv(
            folder / "confusion.csv",
            ["task", *names],
            [(task, *(own[name] for name in names)) for task, own in table.items()],
        )
        draw_confusion(folder / "confusion.png", table, names)


def draw_confusion(path: Path, table: dict[str, Counter[str]], names: list[str]) -> None:
    """Draws shares of each task's rows as a heat map.

    Args:
        path: the PNG to write.
        table: rows by task and expert.
        names: the experts, the columns.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shares = [[own[name] / max(1, own.total()) for name in names] for own in table.values()]
    figure = Figure(figsize=(2.5 + 0.35 * len(names), 2.2 + 0.3 * len(table)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    image = axes.imshow(shares, "viridis", vmin=0, vmax=1)
    axes.set_yticks(range(len(table)), list(table))
    axes.set_xticks(range(len(names)), names, rotation=90)
    axes.set_title("share of a task's rows (row) routed to an expert (column)")
    figure.colorbar(image, ax=axes)
    figure.savefig(path, dpi=120)
