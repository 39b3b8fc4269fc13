"""The training half of a method: one step's loss out of all its terms, one optimizer with named groups."""

import math
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from moe_peft.agreement import from_all_ranks
from moe_peft.batch import Batch
from moe_peft.methods.step_facts import StepFacts, pack
from moe_peft.optim import LOWER_THE_RATE, WarmupDecay, optimizer_groups, parameter_groups
from moe_peft.sharding import local

if TYPE_CHECKING:
    from moe_peft.methods.base import MultitaskModule

LossMean = Literal["row", "token", "task"]
"""Over what the task loss is averaged (see `MultitaskModule`)."""


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

    closed_groups: frozenset[str] = frozenset()
    """Parameter groups that the present stage of training leaves as they are (a callback sets it; see `GROUPS`)."""
    row_loss: Tensor | None = None
    """[B] the rows' own losses in the running step, detached; None where it has no task loss."""
    facts: StepFacts
    """What the last micro-batch was, over all ranks."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Task loss plus every term of the method and of the callbacks; each is logged as `train/<name>`."""
        module = self._module()
        module.begin(batch)
        self.row_loss = None
        terms = module.step_losses(batch)
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if hasattr(callback, "loss_terms"):
                terms |= callback.loss_terms(module, batch)
        loss: Tensor = sum(terms.values(), start=torch.zeros((), device=batch["input_ids"].device))
        loss = loss + untouched(module, self.closed_groups)
        rows, packed = len(batch["row_id"]), pack(module, loss, self.row_loss, batch)
        packed = self.trainer.strategy.reduce(packed, reduce_op="mean")
        self.facts = StepFacts.of(packed.tolist(), self.trainer.world_size)
        if not math.isfinite(self.facts.loss):  # which every rank sees, so that none waits for another
            raise ValueError(f"the loss is not finite at step {self.global_step}: {not_finite(module, loss, batch)}")
        self.log("train/loss", packed[0], prog_bar=True, batch_size=rows)
        for name, part in terms.items() if len(terms) > 1 else ():
            self.log(f"train/{name}", part.detach(), batch_size=rows, sync_dist=True)
        return loss

    def step_losses(self, batch: Batch) -> dict[str, Tensor]:
        """Returns the named, weighted losses of a training batch that has begun: the task loss and the method's own."""
        module = self._module()
        return {"task_loss": task_loss(module, batch)} | module.method_loss_terms(batch)

    def configure_optimizers(self) -> Any:
        """One optimizer with the named groups of `moe_peft.optim`, one schedule stepped every optimizer step."""
        module = self._module()
        optimizer = module.optimizer(optimizer_groups(module, module.lr, module.weight_decay, module.default_rates))
        if module.scheduler is None:
            return optimizer
        scheduler = module.scheduler(optimizer)
        if isinstance(scheduler, WarmupDecay):
            total = self.trainer.estimated_stepping_batches
            if math.isinf(total):
                raise ValueError(
                    "scheduler: WarmupDecay must know the last step, which trainer.max_time alone does not tell; give "
                    "trainer.max_steps or trainer.max_epochs too, or scheduler: null"
                )
            scheduler.set_total_steps(int(total))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def not_finite(module: "MultitaskModule", loss: Tensor, batch: Batch) -> str:
    """Names the tasks and rows of all ranks whose loss is not finite, and what may help."""
    own = sorted({module.specs[task].name for task in batch["task_id"].tolist()}), batch["row_id"], loss.item()
    bad = [found for found in from_all_ranks(own) if not math.isfinite(found[2])]
    rows = "; ".join(f"{value} for rows {', '.join(ids)} of {', '.join(names)}" for names, ids, value in bad)
    return f"{rows or 'on no rank alone'}; {LOWER_THE_RATE}, and resume from the last checkpoint"


def task_loss(module: "MultitaskModule", batch: Batch) -> Tensor:
    """Returns this rank's share of the task loss, which the gradient's mean over ranks and accumulation makes whole."""
    means, sums = module.row_losses(batch)
    module.row_loss = means.detach()
    if module.loss_mean == "row":
        return means.sum() / batch["rows_share"]
    if module.loss_mean == "token":
        return sums.sum() / batch["tokens_share"]
    return (means / batch["task_share"]).sum()


def untouched(module: "MultitaskModule", closed: frozenset[str]) -> Tensor | float:
    """Returns zero, out of every parameter of the closed groups: data-parallel training wants each in every step."""
    if not closed:
        return 0.0
    groups = parameter_groups(module)
    parameters = [parameter for name in closed for parameter in groups.get(name, ())]
    return 0.0 * sum(local(parameter).sum() for parameter in parameters)
