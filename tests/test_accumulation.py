"""Accumulation over micro-batches leaves the gradient of the global batch as it is."""

import pytest
import torch
from lightning.pytorch import Callback, Trainer

from moe_peft.backbones import CausalLM
from moe_peft.callbacks.semantic_prior import SemanticPriorFit
from moe_peft.data.module import MultitaskDataModule
from moe_peft.methods.trex import TRex
from tests.tiny import randomise
from tests.tiny_runs import world  # noqa: F401  (a fixture)


class Gradients(Callback):
    """Makes every adapter tensor alive before the first step and keeps the gradients of that step."""

    def __init__(self, spoil=None):
        self.found, self.spoil, self.sizes = {}, spoil, []

    def on_train_start(self, trainer, pl_module):
        randomise(pl_module, scale=0.1)  # larger ones amplify rounding

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.sizes.append(len(batch["row_id"]))
        if self.spoil is not None:
            self.spoil(batch)

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.found = {name: p.grad.clone() for name, p in pl_module.named_parameters() if p.requires_grad}


def gradients(world, root, accumulation, loss_mean, spoil=None):  # noqa: F811
    """The gradient of one step of 16 rows, whose answers have 2 to 13 tokens with the end token."""
    backbone = CausalLM(str(world.backbones["causal"]), dtype="float32")
    data = MultitaskDataModule(
        [str(world.tasks["count"]), str(world.tasks["tone"])], backbone, batch_size=16, max_length=48
    )
    torch.manual_seed(0)
    module = TRex(backbone=backbone, tasks=data.specs, r1=2, r2=3, loss_mean=loss_mean)
    capture = Gradients(spoil)
    trainer = Trainer(
        accelerator="cpu",
        max_steps=1,
        accumulate_grad_batches=accumulation,
        callbacks=[SemanticPriorFit(n_init=1), capture],
        default_root_dir=str(root),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        use_distributed_sampler=False,
    )
    trainer.fit(module, datamodule=data)
    assert capture.sizes == [16 // accumulation] * accumulation
    answers = {len(row.answer) - 1 for row in data.rows("train")}
    assert {1, 12} <= answers
    return capture.found


def difference(one, other):
    """The largest difference between two gradients."""
    assert one.keys() == other.keys()
    assert max(float(gradient.abs().max()) for gradient in one.values()) > 0.1
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.mark.parametrize("loss_mean", ["row", "token"])
def test_accumulation_does_not_change_the_gradient(world, tmp_path, loss_mean):  # noqa: F811
    whole, halves, quarters = (gradients(world, tmp_path, steps, loss_mean) for steps in (1, 2, 4))
    assert all(gradient.abs().max() > 0 for gradient in whole.values())
    assert difference(whole, halves) < 1e-6
    assert difference(whole, quarters) < 1e-6


def test_a_mean_per_micro_batch_would_change_the_gradient(world, tmp_path):  # noqa: F811
    def spoil(batch):
        batch["tokens_share"] = float((batch["labels"] != -100).sum())

    right, wrong = (gradients(world, tmp_path, 4, "token", how) for how in (None, spoil))
    assert difference(right, wrong) > 1e-2
