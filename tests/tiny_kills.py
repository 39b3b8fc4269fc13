"""Fits that are interrupted, in this process or in real ones, and what must be the same afterwards."""

import csv
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import torch_io
from lightning.pytorch import Callback

from tests.tiny_runs import recorded, results

ROOT = Path(__file__).parents[1]


def adding(config: dict[str, Any], name: str, **arguments: Any) -> dict[str, Any]:
    """Adds one of this file's callbacks to a configuration."""
    config["trainer"]["callbacks"].append({"class_path": f"tests.tiny_kills.{name}", "init_args": arguments})
    return config


class Signals(Callback):
    """Sends its own process signals, each after the micro-batch of a number.

    Args:
        after: names of signals by that number.
    """

    def __init__(self, after: dict[int, str]) -> None:
        self.after = after

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        name = self.after.get(trainer.fit_loop.total_batch_idx)
        if name is not None:
            os.kill(os.getpid(), getattr(signal, name))


class Own(Callback):
    """A user's own checkpoint, written after the micro-batch of a number into <run>/own.ckpt.

    Args:
        after: that number.
    """

    def __init__(self, after: int) -> None:
        self.after = after

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.fit_loop.total_batch_idx == self.after:
            trainer.save_checkpoint(Path(trainer.default_root_dir) / "own.ckpt")


class HalfWritten(Callback):
    """Kills its own process half-way through writing a checkpoint.

    Args:
        number: the checkpoint's, counted from 1.
    """

    def __init__(self, number: int) -> None:
        self.number, self.whole_save = number, torch_io._atomic_save

    def on_train_start(self, *_: Any) -> None:
        torch_io._atomic_save = self.save

    def save(self, checkpoint: Any, path: Path) -> None:
        self.number -= 1
        self.whole_save(checkpoint, path)
        if not self.number:
            os.truncate(path, path.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)


def table(folder: Path) -> list[list[str]]:
    """All rows of metrics.csv; their order within a step says nothing."""
    with (folder / "metrics.csv").open(newline="") as file:
        return sorted(csv.reader(file))


def assert_uninterrupted(folder: Path, whole: Path, interruptions: int = 1, ranks: int = 1) -> None:
    """All that a run's processes did is what one process did that was never interrupted.

    The micro-batches have the same rows and losses bit for bit, none is left out, none comes twice but those that an
    interruption took back, and the metrics and the results are the same.

    Args:
        folder: the run folder.
        whole: that of the uninterrupted run.
        interruptions: how many there were.
        ranks: of both.
    """
    for rank in range(ranks):
        lines, expected = ([line for line in recorded(run) if line["rank"] == rank] for run in (folder, whole))
        assert [line["batch"] for line in expected] == list(range(len(expected)))
        assert lines == [expected[line["batch"]] for line in lines]
        places = [-1, *(line["batch"] for line in lines), len(expected)]
        jumps = [(one, two) for one, two in zip(places, places[1:], strict=False) if two != one + 1]
        assert len(jumps) <= interruptions and all(two <= one for one, two in jumps), jumps
    assert table(folder) == table(whole)
    assert results(folder / "results.json")["rows"] == results(whole / "results.json")["rows"]


def start(file: Path, folder: Path, *more: str) -> subprocess.Popen[str]:
    """Starts `python -m moe_peft fit` in a process group of its own; stdout and stderr go to <folder>.log."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "moe_peft", "fit", f"--config={file}", f"--trainer.default_root_dir={folder}"]
    with folder.with_suffix(".log").open("w") as log:
        return subprocess.Popen(
            [*command, *more], cwd=ROOT, env=environment, stdout=log, stderr=log, text=True, start_new_session=True
        )


def finish(process: subprocess.Popen[str], folder: Path, status: int = 0) -> str:
    """Waits for a process to end with a status; returns what it said."""
    try:
        process.wait(180)
    finally:
        stop(process, signal.SIGKILL)
    said = folder.with_suffix(".log").read_text()
    assert process.returncode == status, said[-2000:]
    return said


def wait_for(process: subprocess.Popen[str], reached: Callable[[], bool]) -> None:
    """Waits for something that a process does before it ends."""
    deadline = time.monotonic() + 120
    while not reached():
        assert process.poll() is None and time.monotonic() < deadline, process.returncode
        time.sleep(0.002)


def stop(process: subprocess.Popen[str], signum: signal.Signals) -> None:
    """Sends a signal to a process and all that it started."""
    try:
        os.killpg(process.pid, signum)
    except ProcessLookupError:
        pass


def step_of(file: Path) -> int:
    """The optimizer step of a checkpoint."""
    return torch.load(file, weights_only=True)["global_step"]
