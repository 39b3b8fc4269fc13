"""`predict` writes one JSON line per input: scores per option, the choice, the task, the routing summary."""

from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer

from moe_peft.methods.base import MultitaskModule
from moe_peft.methods.evaluation import gather


class PredictionFile(Callback):
    """Writes `<run>/predictions.<checkpoint>.jsonl` after `predict`.

    Args:
        path: another file to write; it must not exist yet.
    """

    def __init__(self, path: str | None = None) -> None:
        self.path = path

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuses an existing file before any work."""
        if stage == "predict" and self.path is not None and Path(self.path).exists():
            raise ValueError(f"path: {self.path!r} exists; name another file for the predictions")

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gathers all ranks' predictions and writes them, ordered by row id."""
        assert isinstance(pl_module, MultitaskModule)
        batches = trainer.predict_loop.predictions or []
        rows = gather([prediction for batch in batches for prediction in batch])  # type: ignore[union-attr]
        if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        stem = Path(trainer.ckpt_path).stem if trainer.ckpt_path else "none"
        path = Path(self.path or Path(trainer.default_root_dir) / f"predictions.{stem}.jsonl")
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w") as file:
            for prediction in rows:
                file.write(prediction.to_json(pl_module.ranking, pl_module.specs[prediction.task].name) + "\n")
        print(f"{len(rows)} predictions in {path}")
