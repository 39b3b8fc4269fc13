"""Contestants that make one step when they are told to, each in the main thread of a process of its own.

Side by side in one process they would share an allocator: in a second thread, the same step of the same fit took some
fifteen percent longer.
"""

import multiprocessing
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from moe_peft.callbacks.guards import Guards
from moe_peft.comparison.peft_script import PeftScript
from moe_peft.data.module import MultitaskDataModule
from moe_peft.loggers import MetricsCSV
from moe_peft.methods.base import MultitaskModule


class Step(NamedTuple):
    """What a step was."""

    loss: float
    """Before it."""
    cpu: float
    """CPU seconds of its process."""
    wall: float


class Turns:
    """A contestant's own end of the pipe."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._began = (0.0, 0.0)

    def wait(self) -> None:
        """Says that all is ready for the next step, and waits until it may begin."""
        self._pipe.send("ready")
        self._pipe.recv()
        self._began = time.process_time(), time.perf_counter()

    def done(self, loss: float) -> None:
        """Tells what the step was."""
        cpu, wall = self._began
        self._pipe.send(Step(loss, time.process_time() - cpu, time.perf_counter() - wall))


class Contestant:
    """A process in which a script or a fit takes its turns; it begins with a copy of all that is there now.

    Args:
        name: what a table calls it.
        play: calls `Turns.wait` before and `Turns.done` after every step.
    """

    def __init__(self, name: str, play: Callable[[Turns], None]) -> None:
        self.name = name
        context = multiprocessing.get_context("fork")  # nothing needs to be pickled, and no weight is copied
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_run, args=(play, other), daemon=True)
        self._process.start()
        other.close()
        self._told()

    def step(self) -> Step:
        """Makes one optimizer step on the next batch.

        Raises:
            RuntimeError: what ended the process instead.
        """
        self._pipe.send("go")
        found = self._told()
        self._told()  # it is ready for the next one
        return found

    def end(self) -> None:
        """Ends the process, wherever it is."""
        self._process.kill()  # a fit answers to SIGTERM when its step has ended
        self._process.join()

    def _told(self) -> Any:
        try:
            told = self._pipe.recv()
        except EOFError:
            raise RuntimeError(f"{self.name} ended before its time") from None
        if isinstance(told, Exception):
            raise RuntimeError(f"{self.name}: {told}")
        return told


def _run(play: Callable[[Turns], None], pipe: Connection) -> None:
    try:
        play(Turns(pipe))
    except Exception as error:
        pipe.send(RuntimeError(str(error)))


def play_script(script: PeftScript) -> Callable[[Turns], None]:
    """Returns what runs a script step by step."""

    def play(turns: Turns) -> None:
        while True:
            turns.wait()
            turns.done(script.step())

    return play


class TakeTurns(Callback):
    """Waits for its turn where a step has ended."""

    def __init__(self, turns: Turns) -> None:
        self._turns = turns

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Waits before the first step."""
        self._turns.wait()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *args: Any) -> None:
        """Tells the step's loss and waits."""
        self._turns.done(outputs["loss"].item())
        self._turns.wait()


def play_fit(
    module: MultitaskModule,
    data: MultitaskDataModule,
    callbacks: Sequence[Callback],
    steps: int,
    clip: float,
    threads: int,
    folder: str,
) -> Callable[[Turns], None]:
    """Returns what runs a fit step by step, with its trainer, loggers and callbacks.

    Args:
        module: the method.
        data: its data.
        callbacks: the method's own.
        steps: at most so many.
        clip: largest norm of all gradients.
        threads: of torch.
        folder: for the loggers' files.
    """

    def play(turns: Turns) -> None:
        torch.set_num_threads(threads)
        trainer = Trainer(
            accelerator="cpu",
            devices=1,
            max_steps=steps + 1,  # a method with two stages stays in its first one for all of them
            limit_val_batches=0,
            gradient_clip_val=clip,
            log_every_n_steps=10,
            default_root_dir=folder,
            logger=[MetricsCSV(folder), TensorBoardLogger(folder, name="", version="tensorboard")],
            callbacks=[Guards(), *callbacks, TakeTurns(turns)],
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
            use_distributed_sampler=False,
        )
        trainer.fit(module, datamodule=data)

    return play
