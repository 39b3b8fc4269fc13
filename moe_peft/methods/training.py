"""The training half of a method: one step's loss out of all its terms, one optimizer with named groups."""

from typing import TYPE_CHECKING, Any, Protocol

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from moe_peft.batch import Batch
from moe_peft.optim import WarmupDecay, optimizer_groups

if TYPE_CHECKING:
    from moe_peft.methods.base import MultitaskModule


class LossTerms(Protocol):
    """A callback that adds weighted terms to the training loss, computed inside `training_step`."""

    def loss_terms(self, module: "MultitaskModule", batch: Batch) -> dict[str, Tensor]:
        """Returns named scalar terms, already weighted."""
        ...


class Part(LightningModule):
    """A part of `MultitaskModule` in a file of its own."""

    def _module(self) -> "MultitaskModule":
        return self  # type: ignore[return-value]


class TrainingSteps(Part):
    """The training half of `MultitaskModule`."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Task loss plus every term of the method and of the callbacks; each is logged as `train/<name>`."""
        module = self._module()
        module.begin(batch)
        means, sums = module.row_losses(batch)
        by_row = module.loss_mean == "row"
        task_loss = means.sum() / batch["rows_share"] if by_row else sums.sum() / batch["tokens_share"]
        terms = module.method_loss_terms(batch)
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if hasattr(callback, "loss_terms"):
                terms |= callback.loss_terms(module, batch)
        loss = task_loss + sum(terms.values())
        if not torch.isfinite(loss):
            raise ValueError(f"the loss is {loss.item()} at step {self.global_step}; rows {', '.join(batch['row_id'])}")
        parts = {"task_loss": task_loss, **terms} if terms else {}
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=len(means), sync_dist=True)
        for name, part in parts.items():
            self.log(f"train/{name}", part.detach(), batch_size=len(means), sync_dist=True)
        return loss

    def configure_optimizers(self) -> Any:
        """One optimizer with the named groups of `moe_peft.optim`, one schedule stepped every optimizer step."""
        module = self._module()
        optimizer = module.optimizer(optimizer_groups(module, module.lr, module.weight_decay, module.default_rates))
        if module.scheduler is None:
            return optimizer
        scheduler = module.scheduler(optimizer)
        if isinstance(scheduler, WarmupDecay):
            scheduler.set_total_steps(int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
