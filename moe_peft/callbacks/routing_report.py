"""Who is routed where, written while a run goes on: `<run>/routing/`, and four numbers for the loggers.

Training batches are watched as they pass. What a validation or test is about is recorded by a pass of its own over a
few fixed rows, so that numbers of different steps, runs and numbers of processes are of the same text. Neither changes
a bit of what is trained or scored.
"""

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning_utilities.core.rank_zero import rank_zero_warn

from moe_peft.agreement import from_all_ranks
from moe_peft.batch import Batch
from moe_peft.data.module import MultitaskDataModule
from moe_peft.data.tasks import Split
from moe_peft.methods.base import MultitaskModule
from moe_peft.methods.evaluation import CONFIDENCE, ROUTED_AS
from moe_peft.predictions import Prediction
from moe_peft.routing import tables
from moe_peft.routing.numbers import Asked, Finding, LayerUse, overall
from moe_peft.routing.rebuild import step_of
from moe_peft.routing.recording import Place, measured, observer, record
from moe_peft.routing.sums import RoutingSums

log = logging.getLogger(__name__)
NAMED = 5
"""Findings of a kind that a warning names."""


class RoutingReport(Callback):
    """Records the routing of a fit and of its test; silent where nothing is routed.

    A later test records what the fit did not; `routing.rebuild.record_run` records anew.

    Args:
        rows_per_task: rows of every task that are recorded of each validation and test split; 0 records none.
        every_n_steps: optimizer steps from one watched training step to the next; 0 watches none.

    Raises:
        ValueError: a negative number.
    """

    def __init__(self, rows_per_task: int = 8, every_n_steps: int = 50) -> None:
        for name, value in (("rows_per_task", rows_per_task), ("every_n_steps", every_n_steps)):
            if value < 0:
                raise ValueError(f"RoutingReport: {name} is {value}; give a number, or 0 to record none")
        self.rows_per_task, self.every_n_steps = rows_per_task, every_n_steps
        self._watched: RoutingSums | None = None
        """Of the running step."""
        self._step = -1
        """The last step that was watched, by the number of those before it."""
        self._fitted = False
        self._recent: RoutingSums | None = None
        """Of all watched steps since the last validation."""
        self._lines: list[tables.Row] = []
        """For summary.csv, not yet written."""
        self._warned: set[Split] = set()

    # ---- training batches -------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Drops what an interrupted fit wrote after the step that this one goes on from, or all of another fit."""
        self._watched = self._recent = None
        self._step, self._lines, self._fitted = -1, [], True
        if self._writes(trainer):
            tables.forget_after(self._folder(trainer), trainer.global_step if trainer.ckpt_path else -1)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        """Watches the batch, if it is of a step that is due."""
        assert isinstance(pl_module, MultitaskModule)
        step = trainer.global_step
        if not self.every_n_steps or step % self.every_n_steps or trainer.fast_dev_run or not pl_module.routes:  # type: ignore[attr-defined]
            return
        if self._watched is None or self._step != step:
            self._watched, self._step = RoutingSums(len(pl_module.specs)), step
        pl_module.context.observe(observer(pl_module, batch, self._watched))

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """Takes the sums of a watched step once all of its micro-batches have passed."""
        assert isinstance(pl_module, MultitaskModule)
        if self._watched is None:
            return
        pl_module.context.observe(None)
        if trainer.global_step == self._step:
            return
        sums, self._watched = self._watched, None
        sums.join()
        uses = measured(pl_module, sums)
        if not uses or not trainer.is_global_zero:
            return
        self._recent = self._recent or RoutingSums(sums.tasks)
        self._recent.update(sums)
        self._lines += tables.summary_rows(self._step, "train", uses)
        log_numbers(trainer, "routing/", self._step, uses)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Writes what a fit that goes on from this checkpoint will not record again."""
        self._write_summary(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes what came after the last validation."""
        assert isinstance(pl_module, MultitaskModule)
        self._write_training(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Looks away."""
        assert isinstance(pl_module, MultitaskModule)
        pl_module.context.observe(None)

    def _write_summary(self, trainer: Trainer) -> None:
        lines, self._lines = self._lines, []
        if lines and self._writes(trainer):
            tables.write_summary(self._folder(trainer), lines)

    def _write_training(self, trainer: Trainer, module: MultitaskModule) -> None:
        self._write_summary(trainer)
        recent, self._recent = self._recent, None
        if recent is not None and self._writes(trainer):
            names, uses = [spec.name for spec in module.specs], measured(module, recent)
            tables.write_use(self._folder(trainer), self._step, "train", names, uses)

    # ---- validations and tests --------------------------------------------------------------------------------------

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Records the validation split, in a fit."""
        assert isinstance(pl_module, MultitaskModule)
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._write_training(trainer, pl_module)
            uses = self._record(trainer, pl_module, "validation", trainer.global_step)
            if uses:
                log_numbers(trainer, "routing/val_", trainer.global_step, uses)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Records the test split, unless it was."""
        assert isinstance(pl_module, MultitaskModule)
        if not self._fitted and trainer.strategy.broadcast(tables.known(self._folder(trainer), "test")):
            return
        step = step_of(trainer.ckpt_path) if trainer.ckpt_path else trainer.global_step
        self._record(trainer, pl_module, "test", step)

    def _record(
        self, trainer: Trainer, module: MultitaskModule, split: Split, step: int
    ) -> Mapping[str, LayerUse] | None:
        """Records a split and writes it; returns the numbers on rank zero, if there are any."""
        if not self.rows_per_task or trainer.fast_dev_run or not module.routes:  # type: ignore[attr-defined]
            return None
        data = trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(data, MultitaskDataModule):
            if not self._warned:
                rank_zero_warn("RoutingReport records validations and tests of a MultitaskDataModule only")
            self._warned.add(split)
            return None
        place = Place(trainer.world_size, trainer.global_rank)
        with trainer.precision_plugin.forward_context():
            found = record(module, data, split, self.rows_per_task, place, mapped=split == "test")
        for asked in from_all_ranks(asked_of(module.predictions["model"])):  # all rows, where the evaluation asked
            found.asked |= asked
        if not self._writes(trainer) or not found.sums.layers:
            return None
        uses, faults = found.write(self._folder(trainer), step, split)
        self._warn(split, step, faults)
        return uses

    def _warn(self, split: Split, step: int, found: list[Finding]) -> None:
        """Names dead experts and collapsed layers, the first time that a split shows any."""
        if not found or split in self._warned:
            return
        self._warned.add(split)
        named: dict[str, list[str]] = {}
        for each in found:
            named.setdefault(each.kind, []).append(f"{each.expert} of {each.layer}")
        parts = []
        for kind, own in named.items():
            what = "dead experts" if kind == "dead" else "experts that take all of a layer"
            more = f" and {len(own) - NAMED} more" if len(own) > NAMED else ""
            parts.append(f"{len(own)} {what} ({'; '.join(own[:NAMED])}{more})")
        said = "routing of %s rows at step %d: %s; see routing/findings.json"
        log.warning(said, split, step, ", ".join(parts))

    @staticmethod
    def _writes(trainer: Trainer) -> bool:
        return trainer.is_global_zero and not trainer.fast_dev_run  # type: ignore[attr-defined]

    @staticmethod
    def _folder(trainer: Trainer) -> Path:
        return Path(trainer.default_root_dir) / "routing"


def log_numbers(trainer: Trainer, prefix: str, step: int, uses: Mapping[str, LayerUse]) -> None:
    """Hands the layers' numbers in one to the loggers."""
    numbers = {f"{prefix}{name}": float(value) for name, value in overall(uses)._asdict().items()}
    for sink in trainer.loggers:
        sink.log_metrics(numbers, step=step)


def asked_of(predictions: list[Prediction]) -> dict[str, Asked]:
    """Returns how sure a router for whole rows was of the rows of an evaluation, all of them."""
    found = {}
    for row in predictions:
        if row.routing and math.isfinite(row.routing.get(CONFIDENCE, math.nan)):
            elsewhere = any(name.startswith(ROUTED_AS) for name in row.routing)
            found[row.row_id] = Asked(row.task, row.routing[CONFIDENCE], not elsewhere)
    return found
