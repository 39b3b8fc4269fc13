"""After every test: the table on the screen, results files in the run folder, the base's answers in a cache."""

import json
import os
import platform
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_utilities.core.rank_zero import rank_zero_warn

from moe_peft import __version__
from moe_peft.backbones import Backbone
from moe_peft.callbacks import base_cache
from moe_peft.data.tasks import TaskSpec
from moe_peft.predictions import Prediction, Ranking, majority_predictions
from moe_peft.report import Facts, Report
from moe_peft.writing import write_text


class TestedModule(Protocol):
    """What the callback reads from, and sets on, the LightningModule."""

    specs: Sequence[TaskSpec]
    predictions: dict[str, list[Prediction]]
    ranking: Ranking
    score_base: bool
    fingerprint: str
    backbone: Backbone
    max_new_tokens: int

    @property
    def base_available(self) -> bool:
        """Whether the untouched base can answer at all."""
        ...

    @property
    def routes(self) -> bool:
        """Whether a router decides anything about the rows."""
        ...

    def trainable_parameters(self) -> int:
        """Counts trainable numbers."""
        ...

    def routing_notes(self) -> dict[str, str]:
        """What the table must say of how tasks were routed, by task."""
        ...


class Results(Callback):
    """Writes results.json and results.md after the test that follows a fit; results.test-<checkpoint>.* after others.

    The first two rows of the table are the untouched base, on the same rows, and the majority class of the train
    split. The base's answers do not change from run to run, so they are kept by base, precision, rows and protocol.

    Args:
        cache_dir: Where the base's answers are kept (default ~/.cache/moe_peft/base).
        base_row: Score the untouched base; false saves its pass over the test rows.
        save_predictions: Write the model's predictions as JSON lines beside the results.
    """

    def __init__(self, cache_dir: str | None = None, base_row: bool = True, save_predictions: bool = False) -> None:
        self.cache_dir = Path(cache_dir).expanduser() if cache_dir else base_cache.FOLDER
        self.base_row = base_row
        self.save_predictions = save_predictions
        self._fitted = False
        self._fit_seconds = 0.0
        self._fit_started: float | None = None
        self._cache_file: Path | None = None
        self._cached: list[Prediction] | None = None

    # ---- before and during the work ---------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuses a run folder that cannot be written, before hours are spent.

        Raises:
            ValueError: the folder cannot be made or written.
        """
        if stage not in ("fit", "test") or trainer.fast_dev_run or not trainer.is_global_zero:  # type: ignore[attr-defined]
            return
        folder = Path(trainer.default_root_dir)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=folder, buffering=0) as file:
                file.write(b"x" * 4096)
        except OSError as error:
            raise ValueError(
                f"default_root_dir='{folder}' cannot be written ({error.strerror}); "
                "free the disk, or name another folder with --trainer.default_root_dir"
            ) from None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the clock."""
        self._fit_started = time.monotonic()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stops the clock."""
        self._fit_seconds, self._fit_started, self._fitted = self._elapsed(), None, True

    def state_dict(self) -> dict[str, float]:
        """The seconds of the fit so far: a resumed fit goes on counting."""
        return {"fit_seconds": self._elapsed()}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        """Takes over the seconds of the interrupted fit."""
        self._fit_seconds = state_dict["fit_seconds"]

    def _elapsed(self) -> float:
        return self._fit_seconds + (0.0 if self._fit_started is None else time.monotonic() - self._fit_started)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Asks the module for the base's answers unless the cache has them; all ranks do the same."""
        module = cast(TestedModule, pl_module)
        self._cached, self._cache_file = None, None
        module.score_base = self.base_row and module.base_available
        all_rows = isinstance(trainer.limit_test_batches, float) and trainer.limit_test_batches == 1.0  # 1 is one batch
        if not module.score_base or not all_rows or not module.fingerprint:
            return
        key = base_cache.key(module, cast(Any, trainer).datamodule.cache_key("test"), str(trainer.precision))
        self._cache_file = self.cache_dir / f"{key}.jsonl"
        if trainer.is_global_zero:
            self._cached = base_cache.read(self._cache_file)
        module.score_base = trainer.strategy.broadcast(self._cached is None)

    # ---- after the test ---------------------------------------------------------------------------------------------

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Shows the table, then writes the files (rank zero; the module has gathered the predictions by now).

        Raises:
            OSError: a results file cannot be written; one line that names it.
        """
        if not trainer.is_global_zero:
            return
        module, data = cast(TestedModule, pl_module), cast(Any, trainer).datamodule
        model = module.predictions["model"]
        labels = {spec.name: data.majority(spec.name) for spec in module.specs if spec.has_options}
        majority = majority_predictions(module.specs, model, labels)
        answers = {"base": self._base_answers(module), "majority": majority, "model": model}
        notes = dict(getattr(data, "notes", {}))
        for task, note in module.routing_notes().items():
            notes[task] = f"{notes[task]}; {note}" if task in notes else note
        report = Report(self._facts(trainer, module, notes), module.specs, answers)
        report.print()
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        self._write_cache(module)
        suffix = "" if self._fitted else f".test-{Path(trainer.ckpt_path).stem if trainer.ckpt_path else 'none'}"
        folder = Path(trainer.default_root_dir)
        write_text(folder / f"results{suffix}.json", json.dumps(report.to_dict(), indent=2, ensure_ascii=False) + "\n")
        write_text(folder / f"results{suffix}.md", report.to_markdown())
        if self.save_predictions:
            names = [spec.name for spec in module.specs]
            lines = [row.to_json(module.ranking, names[row.task]) + "\n" for row in model]
            write_text(folder / f"predictions{suffix}.jsonl", "".join(lines))

    def _base_answers(self, module: TestedModule) -> list[Prediction] | None:
        """The base's predictions of this test, or the cached ones if they are about the same rows and gold answers."""
        if self._cached is None:
            return module.predictions.get("base") or None

        def gold(rows: list[Prediction]) -> dict[str, tuple]:
            return {row.row_id: (row.task, row.label, row.target, row.value) for row in rows}

        if gold(self._cached) == gold(module.predictions["model"]):
            return self._cached
        assert self._cache_file is not None
        self._cache_file.unlink(missing_ok=True)
        rank_zero_warn(f"{self._cache_file} was about other rows and is deleted: test again to get the base's row")
        return None

    def _write_cache(self, module: TestedModule) -> None:
        """Keeps what the base answered in this test; a cache that cannot be written is no reason to fail."""
        if self._cache_file is None or not module.predictions.get("base"):
            return
        try:
            base_cache.write(self._cache_file, module.predictions["base"])
        except OSError as error:
            rank_zero_warn(f"the base's answers are not kept: {error}")

    def _facts(self, trainer: Trainer, module: TestedModule, notes: dict[str, str]) -> Facts:
        seed = os.environ.get("PL_GLOBAL_SEED")
        versions = {"moe_peft": __version__, "python": platform.python_version()}
        return Facts(
            method=type(module).__name__,
            backbone=json.loads(module.backbone.describe()),
            seed=int(seed) if seed else None,
            trainable_parameters=module.trainable_parameters(),
            wall_seconds=self._fit_seconds if self._fitted else None,
            checkpoint=str(trainer.ckpt_path) if trainer.ckpt_path else None,
            validation=self._monitored(trainer) if self._fitted else None,
            versions=versions | {name: version(name) for name in ("torch", "lightning", "transformers")},
            ranking=module.ranking,
            notes=notes,
            routes=module.routes,
        )

    @staticmethod
    def _monitored(trainer: Trainer) -> dict[str, Any] | None:
        """The name and the best value of what the checkpoints went by; None where nothing was monitored."""
        checkpoint = trainer.checkpoint_callback
        if not isinstance(checkpoint, ModelCheckpoint) or checkpoint.best_model_score is None:
            return None
        return {"name": checkpoint.monitor, "value": float(checkpoint.best_model_score)}
