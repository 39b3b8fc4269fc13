"""Inputs that belong to no expert: below a threshold on the router's confidence, the bare base answers.

The threshold is calibrated on validation rows and lies in the module, so a checkpoint needs no callback to use it.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from moe_peft.batch import Batch
from moe_peft.callbacks.rank_report import write_csv
from moe_peft.methods.refusal import Refusal, confidences_of, refusals, summary, threshold
from moe_peft.methods.tt_lora_moe import TTLoRAMoE

logger = logging.getLogger(__name__)


class NullExpert(Callback):
    """Sets, after every validation of a fit, the confidence below which the bare base serves a row.

    The validations of a fit refuse no row themselves. Every one of their rows counts once, whatever its task: where
    tasks have unequally many, the larger ones decide more. A test by the learned router writes
    `<run>/routing/outside.csv`: how many of the mixture's test rows and of those from elsewhere (`data.outside`) are
    refused, and the AUROC at which confidence tells them apart.

    Args:
        keep: share of the validation rows that stay with the experts.

    Raises:
        ValueError: a share that is none, or 0.
    """

    def __init__(self, keep: float = 0.95) -> None:
        if not 0 < keep <= 1:
            raise ValueError(f"NullExpert: keep is {keep}, give a share above 0 and up to 1, for example 0.95")
        self.keep = keep

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuses a method without a router for whole inputs, and a router that has nothing to choose from."""
        if not isinstance(pl_module, TTLoRAMoE):
            raise ValueError(f"NullExpert: {type(pl_module).__name__} routes no whole inputs; drop this callback")
        if len(pl_module.specs) < 2:
            raise ValueError("NullExpert: with one expert a router is equally sure of every input; drop this callback")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Sets the threshold, the same on all ranks, before checkpoint callbacks, which come last, save it."""
        assert isinstance(pl_module, TTLoRAMoE)
        if _calibrates(trainer) and len(confidences := confidences_of(pl_module.predictions["model"])):
            pl_module.null_below.fill_(threshold(confidences, self.keep))

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reads the prompts from elsewhere on every rank, since a sharded base answers only if all ask; one writes."""
        assert isinstance(pl_module, TTLoRAMoE)
        if not pl_module.routes or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        data = trainer.datamodule  # type: ignore[attr-defined]
        given = getattr(data, "outside_rows", {}).items()
        outside = {name: ask(pl_module, data.prompts(rows)) for name, rows in given}
        if not trainer.is_global_zero:
            return
        inside = confidences_of(pl_module.predictions["model"])
        table = refusals(inside, outside, pl_module.null_below.item())
        folder = Path(trainer.default_root_dir) / "routing"
        folder.mkdir(parents=True, exist_ok=True)
        write_csv(folder / "outside.csv", list(Refusal._fields), [tuple(line) for line in table])
        logger.info(summary(table))


def _calibrates(trainer: Trainer) -> bool:
    return trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking


def ask(module: TTLoRAMoE, batches: Sequence[Batch]) -> Tensor:
    """Returns the router's confidence in prompts, of whatever task: [M] fp64."""
    moved = (module.transfer_batch_to_device(batch, module.device, 0) for batch in batches)
    return torch.cat([module.router.confidence(module.scores(batch)).double().cpu() for batch in moved])
