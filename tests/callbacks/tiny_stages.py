"""Fits in two stages whose validations say what a test wants, and what was seen of every step."""

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from moe_peft.callbacks.freeze_then_route import FreezeThenRoute
from moe_peft.methods.tt_lora_moe import TTLoRAMoE
from moe_peft.optim import parameter_groups
from tests.methods.tiny_tt import TASKS, rows_for
from tests.tiny import build

EPOCH = 4
"""Batches of an epoch."""


class Scripted(TTLoRAMoE):
    """A TT-LoRA MoE whose validations give the values of `script`, one row of three per validation, then the last."""

    script: tuple[tuple[float | None, ...], ...] = ((0.5, 0.5, 0.5),)
    validations = 0

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Asks nothing of the model."""

    def on_validation_epoch_end(self) -> None:
        """Logs the next row of the script."""
        row = self.script[min(self.validations, len(self.script) - 1)]
        self.validations += 1
        known = {f"val/task{task}/accuracy": value for task, value in enumerate(row) if value is not None}
        self.log_dict(known | {"val/mean": sum(known.values()) / len(known)})


class Watch(pl.Callback):
    """Keeps what every optimizer step and every validation saw: groups, rates, gradients, losses, weights."""

    def __init__(self) -> None:
        self.closed: list[frozenset[str]] = []
        self.rates: list[dict[str, float]] = []
        self.learned: list[set[str]] = []
        self.losses: list[float] = []
        self.after: list[dict[str, Tensor]] = []
        self.validated: list[dict[str, Tensor]] = []

    def on_before_zero_grad(self, trainer: pl.Trainer, module: Any, optimizer: Any) -> None:
        self.rates.append({group["name"]: group["lr"] for group in optimizer.param_groups})
        self.closed.append(module.closed_groups)

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, *_: Any) -> None:
        self.losses.append(float(outputs["loss"]))
        groups = parameter_groups(module)
        self.learned.append({name for name, own in groups.items() if all(p.grad is not None for p in own)})
        self.after.append(weights(module))

    def on_validation_end(self, trainer: pl.Trainer, module: Any) -> None:
        self.validated.append(weights(module))


def weights(module: Any) -> dict[str, Tensor]:
    """A copy of every parameter."""
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def group_of(name: str) -> str:
    """The group of a parameter, or "base"."""
    if ".factors." in name:
        return "adapters"
    return name.split(".")[0].replace("router", "routers").replace("model", "base")


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    """The groups of which any number is another one."""
    return {group_of(name) for name, value in before.items() if not torch.equal(value, after[name])}


def adamw(groups: Any) -> torch.optim.Optimizer:
    """Decay and momentum, which move whatever they reach."""
    return torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.5)


def scripted(kind: str = "causal", *script: tuple[float | None, ...], **options: Any) -> Scripted:
    """A module whose experts all act from the first step."""
    given = {"optimizer": adamw, "scheduler": None, "init": "official", "alpha": 4.0, "rank": 2, "lr": None}
    module = build(Scripted, kind, tasks=TASKS, **given | options)
    module.script = script or module.script
    return module


def fit(
    module: Any,
    folder: Any,
    stages: FreezeThenRoute | None,
    *callbacks: pl.Callback,
    epochs: int = 4,
    resume: Any = None,
    batches: int = EPOCH,
    **trainer: Any,
) -> tuple[pl.Trainer, Watch]:
    """Trains for some epochs of the same four batches; what a resumed fit draws depends on the epoch alone."""
    torch.manual_seed(0)
    watch = Watch()
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    checkpointing = any(isinstance(callback, pl.callbacks.ModelCheckpoint) for callback in callbacks)
    made = pl.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=[callback for callback in (stages, watch, *callbacks) if callback is not None],
        enable_checkpointing=checkpointing,
        **quiet | trainer,
    )
    kind = module.backbone.kind
    rows = [rows_for(kind, 6, seed) for seed in range(batches)]
    train, validation = DataLoader(rows, batch_size=None), DataLoader(rows[:1], batch_size=None)
    made.fit(module, train, validation, ckpt_path=resume, weights_only=resume is not None or None)
    return made, watch
