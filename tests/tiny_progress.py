"""What a fit's progress is compared with: every micro-batch counted anew, with a clock of its own."""

import time
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback

from moe_peft.batch import IGNORE_INDEX
from moe_peft.methods.step_facts import StepFacts

OBSERVER = "tests.tiny_progress.Observer"


class Seen(NamedTuple):
    """A micro-batch, and what the module said of it."""

    step: int
    tasks: list[str]
    losses: list[float]
    tokens: int
    facts: StepFacts
    loss: float
    ended: float


class Observer(Callback):
    """Computes every row's loss in a forward of its own (there must be no dropout), and stamps times.

    Args:
        pause: seconds that every micro-batch and every validation batch takes longer.
    """

    last: "Observer"

    def __init__(self, pause: float = 0.0) -> None:
        self.pause = pause
        self.seen: list[Seen] = []
        self.validations: list[tuple[float, float]] = []
        self.facts = []
        Observer.last = self

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.began = time.monotonic()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        with torch.no_grad():
            self.losses = pl_module(batch).tolist()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        tasks = [row_id.split("/")[0] for row_id in batch["row_id"]]
        tokens = sum(map(sum, batch["attention_mask"].tolist()))
        if pl_module.backbone.kind == "seq2seq":
            tokens += sum(label != IGNORE_INDEX for row in batch["labels"].tolist() for label in row)
        time.sleep(self.pause)
        loss, ended = float(outputs["loss"]), time.monotonic()
        step = trainer.fit_loop.total_batch_idx // trainer.accumulate_grad_batches
        self.seen.append(Seen(step, tasks, self.losses, tokens, pl_module.facts, loss, ended))

    def on_validation_start(self, *_: Any) -> None:
        self.validation_began = time.monotonic()

    def on_validation_batch_end(self, *_: Any) -> None:
        time.sleep(self.pause)

    def on_validation_end(self, *_: Any) -> None:
        self.validations.append((self.validation_began, time.monotonic()))


def task_means(seen: list[Seen]) -> dict[str, float]:
    """The mean loss of every task's rows."""
    rows = [pair for one in seen for pair in zip(one.tasks, one.losses, strict=True)]
    found = {task: [loss for name, loss in rows if name == task] for task in dict.fromkeys(task for task, _ in rows)}
    return {task: sum(losses) / len(losses) for task, losses in found.items()}


def observed(config: dict[str, Any], **options: Any) -> dict[str, Any]:
    """A configuration without dropout, with an Observer in place of the Recorder."""
    config["model"]["init_args"]["dropout"] = 0.0
    config["trainer"]["callbacks"][-1] = {"class_path": OBSERVER, "init_args": options}
    return config
