"""Fits a method on one process or two (`run_processes`); as a script, the fit that it starts.

The global batch is the same either way; of two processes each takes every second row.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from moe_peft.batch import IGNORE_INDEX, Batch
from moe_peft.callbacks.task_contrast import TaskContrast
from moe_peft.methods.more import MoRE
from moe_peft.methods.trex import TRex
from tests.tiny import batch_of, build, fit_prior, random_batch, randomise

ROOT = Path(__file__).parents[2]
STEPS, ROWS = 3, 5  # an odd number: two processes hold unequal shares


class Share(Dataset):
    """One process's rows of every global batch."""

    def __init__(self, processes: int) -> None:
        self.processes = processes

    def __len__(self) -> int:
        return STEPS

    def __getitem__(self, step: int) -> Batch:
        whole = random_batch(ROWS, seed=100 + step)
        rank = torch.distributed.get_rank() if self.processes > 1 else 0
        rows = list(range(rank, ROWS, self.processes))
        prompts = [whole["input_ids"][row][whole["prompt_mask"][row]].tolist() for row in rows]
        answers = [whole["labels"][row][whole["labels"][row] != IGNORE_INDEX].tolist() for row in rows]
        own = batch_of(prompts, answers)
        own["task_id"] = whole["task_id"][rows]
        own["rows_share"] = whole["rows_share"] / self.processes
        own["tokens_share"] = whole["tokens_share"] / self.processes
        return own


class Watch(pl.Callback):
    """Keeps every step's gradients, after they were averaged over the processes."""

    def __init__(self) -> None:
        self.gradients: list[dict[str, Tensor]] = []
        self.losses: list[Tensor] = []

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: object) -> None:
        own = pl_module.named_parameters()
        self.gradients.append({name: p.grad.clone() for name, p in own if p.grad is not None})

    def on_train_batch_end(self, trainer: pl.Trainer, *_: object) -> None:
        self.losses.append(trainer.callback_metrics["train/loss"].clone())


METHODS = {
    "TRex": (TRex, {"r1": 2, "r2": 3}, []),
    "MoRE": (MoRE, {"rank": 4, "rank_cost": 0.1}, [TaskContrast()]),
}


def main(processes: int, result: str, method: str, loss_mean: str) -> None:
    method_class, options, callbacks = METHODS[method]
    module = build(method_class, loss_mean=loss_mean, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-3), **options)
    randomise(module)
    if module.prior is not None:
        fit_prior(module)
    watch = Watch()
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=processes,
        strategy="ddp" if processes > 1 else "auto",
        use_distributed_sampler=False,
        max_epochs=1,
        callbacks=[*callbacks, watch],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(Share(processes), batch_size=None))
    if trainer.is_global_zero:
        torch.save({"losses": watch.losses, "gradients": watch.gradients, "state": module.adapter_state()}, result)


def run_processes(processes: int, folder: Path, method: str, loss_mean: str) -> dict[str, Any]:
    """Fits three steps in processes of their own; returns every step's loss and gradients, and the final state."""
    result = folder / f"{method}-{processes}-{loss_mean}.pt"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, __file__, str(processes), str(result), method, loss_mean]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert result.is_file(), done.stderr[-2000:]
    return torch.load(result, weights_only=True)


def assert_trained_as_one(one: dict[str, Any], two: dict[str, Any], first: float, later: float) -> None:
    """Compares what two processes and one left: losses, gradients and weights.

    Args:
        one: of one process.
        two: of two.
        first: relative tolerance of the first step's gradients.
        later: of the later ones, which start from weights that differ by rounding.
    """
    assert len(one["losses"]) == len(two["losses"]) == 3
    torch.testing.assert_close(two["losses"], one["losses"], rtol=1e-5, atol=1e-5)
    for step, gradients in enumerate(one["gradients"]):
        assert gradients.keys() == two["gradients"][step].keys()
        for name, gradient in gradients.items():
            assert gradient.abs().max() > 0, name
            tolerance = (first if step == 0 else later) * max(gradient.abs().max().item(), 1e-2)
            torch.testing.assert_close(two["gradients"][step][name], gradient, rtol=0, atol=tolerance)
    for name, value in one["state"].items():
        torch.testing.assert_close(two["state"][name], value, rtol=1e-3, atol=1e-4)


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
