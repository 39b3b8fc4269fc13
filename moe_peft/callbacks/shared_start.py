"""Experts that learn as one before they go apart: what tasks can learn of each other is not lost to TT-LoRA MoE.

For the first epochs every expert starts from the first one's cores, and takes the mean of all experts' gradients, after
clipping: one shared TT-LoRA, kept E times. From then on each learns alone, as in arXiv 2504.21190, where an expert sees
the rows of its own task only. (Not in the paper.)
"""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from moe_peft.callbacks.freeze_then_route import FreezeThenRoute
from moe_peft.methods.tt_lora_moe import TTLoRAMoE
from moe_peft.sharding import is_sharded


class SharedStart(Callback):
    """Trains all experts of a TT-LoRA MoE as one for some epochs; heads of tasks stay their own.

    Args:
        epochs: how long; stage one of `FreezeThenRoute` must go on for longer.

    Raises:
        ValueError: epochs below 1.
    """

    def __init__(self, epochs: int = 1) -> None:
        if epochs < 1:
            raise ValueError(f"SharedStart: epochs is {epochs}, it must be at least 1")
        self.epochs = epochs

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuses a method without experts.

        Raises:
            ValueError: names it.
        """
        if not isinstance(pl_module, TTLoRAMoE):
            raise ValueError(f"SharedStart: {type(pl_module).__name__} has no experts of tasks; drop this callback")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Makes the experts equal, unless the fit is resumed.

        Raises:
            ValueError: sharded experts, of whose mean no rank has all parts; experts of other runs; or a stage one that
                leaves the experts no step apart.
        """
        assert isinstance(pl_module, TTLoRAMoE)
        if is_sharded(pl_module):
            raise ValueError("SharedStart: experts are sharded here; train with DDP or on one device")
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, FreezeThenRoute):
                self._refuse(trainer, callback)
        if trainer.ckpt_path is None:
            make_equal(pl_module)

    def _refuse(self, trainer: Trainer, stages: FreezeThenRoute) -> None:
        """Refuses stages of `FreezeThenRoute` in which the experts would never go apart."""
        if stages.expert_paths is not None:
            raise ValueError("SharedStart: the experts of expert_paths are trained already; drop this callback")
        if stages.patience is not None:
            raise ValueError(
                "SharedStart: FreezeThenRoute's patience may end stage one while all experts are one; drop patience"
            )
        shared = self.epochs * -(-int(trainer.num_training_batches) // trainer.accumulate_grad_batches)
        if shared >= stages.boundary(trainer):
            raise ValueError(
                f"SharedStart: epochs {self.epochs} leaves no step to go apart before FreezeThenRoute ends stage one; "
                "give fewer, or a longer stage one"
            )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Shares the gradients of this step, or no longer."""
        assert isinstance(pl_module, TTLoRAMoE)
        pl_module.shares_gradients = trainer.current_epoch < self.epochs


@torch.no_grad()
def make_equal(module: TTLoRAMoE) -> None:
    """Gives every expert the first one's cores."""
    for layer in module.expert_layers():
        for core in layer.factors.parameters():
            core.copy_(core[:1].expand_as(core))
