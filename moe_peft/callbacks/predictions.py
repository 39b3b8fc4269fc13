"""`predict` writes one JSON line per input: scores per option, the choice, the task, the routing summary."""

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from moe_peft.methods.base import MultitaskModule
from moe_peft.methods.evaluation import gather
from moe_peft.predictions import Prediction
from moe_peft.writing import write_text


class PredictionFile(Callback):
    """Writes `<run>/predictions.<checkpoint>.jsonl` after `predict`.

    Args:
        path: another file to write; it must not exist yet.
    """

    def __init__(self, path: str | None = None) -> None:
        self.path = path
        self._rows: list[Prediction] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuses an existing file before any work."""
        if stage == "predict" and self.path is not None and Path(self.path).exists():
            raise ValueError(f"path: {self.path!r} exists; name another file for the predictions")

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Collects the predictions here: Lightning, which would keep them too, cannot move a frozen dataclass."""
        trainer.predict_loop.return_predictions = False
        self._rows = []

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Takes a batch's predictions."""
        self._rows += outputs

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gathers all ranks' predictions and writes them, ordered by row id."""
        assert isinstance(pl_module, MultitaskModule)
        rows = gather(self._rows)
        if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        stem = Path(trainer.ckpt_path).stem if trainer.ckpt_path else "none"
        path = Path(self.path or Path(trainer.default_root_dir) / f"predictions.{stem}.jsonl")
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [row.to_json(pl_module.ranking, pl_module.specs[row.task].name) + "\n" for row in rows]
        write_text(path, "".join(lines))
        print(f"{len(rows)} predictions in {path}")
