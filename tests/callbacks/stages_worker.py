"""Fits both stages on one process or two (`run_stages`); as a script, the fit that it starts.

The global batches are the same either way; of two processes each takes every second row, and so rows of two of the
three tasks only.
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

from moe_peft.batch import Batch
from moe_peft.callbacks.freeze_then_route import FreezeThenRoute
from moe_peft.layers.closed_form_router import PrototypeRouter, RidgeRouter
from moe_peft.layers.expert_router import LinearRouter
from tests.callbacks.tiny_stages import Watch, adamw, scripted, weights
from tests.methods.tiny_tt import take, with_tasks
from tests.tiny import random_batch

ROOT = Path(__file__).parents[2]
STEPS, SWITCH = 8, 4
ROUTERS = {"linear": lambda: LinearRouter(noise=False), "prototype": PrototypeRouter, "ridge": RidgeRouter}
TASK_IDS = (0, 1, 2, 0)
SCRIPT = [(0.1, 0.9, 0.5), (0.3, 0.2, 0.5)]
"""Validations after steps 2 and 4: the first expert is best at the second, the others at the first."""


class Share(Dataset):
    """One process's rows of every global batch."""

    def __init__(self, processes: int, steps: int = STEPS) -> None:
        self.processes, self.steps = processes, steps

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> Batch:
        whole = with_tasks(random_batch(len(TASK_IDS), "classifier", 100 + step), *TASK_IDS)
        rank = torch.distributed.get_rank() if self.processes > 1 else 0
        own = take(whole, *range(rank, len(TASK_IDS), self.processes))
        own["rows_share"] = whole["rows_share"] / self.processes
        own["task_share"] = own["task_share"] / self.processes
        return own


class LoggedLoss(pl.Callback):
    """Keeps every step's loss, averaged over the processes."""

    def __init__(self) -> None:
        self.losses: list[Tensor] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *_: object) -> None:
        self.losses.append(trainer.callback_metrics["train/loss"].clone())


def main(processes: int, folder: str, router: str) -> None:
    module = scripted("classifier", *SCRIPT, optimizer=adamw, router=ROUTERS[router]())
    start, watch, logged = weights(module), Watch(), LoggedLoss()
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=processes,
        strategy="ddp" if processes > 1 else "auto",
        use_distributed_sampler=False,
        max_epochs=1,
        val_check_interval=2,
        gradient_clip_val=0.05,
        callbacks=[FreezeThenRoute(SWITCH), watch, logged],
        logger=False,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(module, DataLoader(Share(processes), batch_size=None), DataLoader(Share(processes, 1), batch_size=None))
    seen = {"start": start, "after": watch.after, "validated": watch.validated, "losses": logged.losses}
    seen["router"] = module.router.state_dict()
    torch.save(seen, Path(folder) / f"{processes}-{trainer.global_rank}.pt")


def run_stages(processes: int, folder: Path, router: str = "linear") -> list[dict[str, Any]]:
    """Fits in processes of their own; returns what each of them saw."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, __file__, str(processes), str(folder), router]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    results = [folder / f"{processes}-{rank}.pt" for rank in range(processes)]
    assert all(file.is_file() for file in results), done.stderr[-2000:]
    return [torch.load(file, weights_only=True) for file in results]


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
