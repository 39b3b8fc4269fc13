"""The fits of a comparison: what each of them is, whether it is finished, and how it is run.

A fit's folder is named by the hash of all that decides what it trains on (see `identity`), of seed and learning rate.
So an edited comparison finds what it left unchanged, and nothing is ever written over.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from moe_peft.callbacks.costs import Costs
from moe_peft.optim import LOWER_THE_RATE
from moe_peft.rack.commit import commit
from moe_peft.rack.rows import Row, digest
from moe_peft.rack.settings import merged
from moe_peft.writing import write_text

ABOUT, OVERLAY, DECIDED, LOG = "rack.json", "rack.yaml", "decided.yaml", "rack.log"
"""Beside what a fit writes into its folder: what it is, the configuration laid over its method's and that laid over the
command line, and all it said."""
RESULTS = "results.json"
"""What the test at its end writes there."""


class Fit(NamedTuple):
    """One run of a row."""

    row: Row
    seed: int
    rate: float | None
    """The learning rate; None for the row's own."""
    folder: Path
    more: tuple[str, ...]
    """Further arguments of the command line, each in one word."""

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.row.tag}, seed {self.seed}" + ("" if self.rate is None else f", learning rate {self.rate:g}")

    @property
    def about(self) -> dict[str, Any]:
        """What is known of the fit; empty before it was begun."""
        file = self.folder / ABOUT
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}

    @property
    def finished(self) -> bool:
        """Whether it has come to its end and was tested; the last thing that is written down of it."""
        return bool(self.about.get("finished"))

    @property
    def failed(self) -> str | None:
        """What a fit that diverged has said; None for any other."""
        return self.about.get("failed")

    @property
    def resumable(self) -> bool:
        """Whether it broke off with a checkpoint to go on from."""
        names = ("last.ckpt", "last.previous.ckpt")
        return (self.folder / "config.yaml").is_file() and any(
            (self.folder / "checkpoints" / name).is_file() for name in names
        )

    @property
    def command(self) -> list[str]:
        """The command line."""
        files = [f"--config={file}" for file in (*self.row.files, self.folder / OVERLAY)]
        own = [
            f"--config={self.folder / DECIDED}",
            f"--seed_everything={self.seed}",
            f"--trainer.default_root_dir={self.folder}",
            "--results.save_predictions=true",
            f"--trainer.callbacks+={Costs.__module__}.{Costs.__name__}",
        ]
        resume = ["--ckpt_path=last"] if self.resumable else []
        return [sys.executable, "-m", "moe_peft", "fit", *files, *self.more, *own, *resume]

    def run(self, lock: int) -> None:
        """Runs the fit in a process of its own, from where it broke off if it has.

        Args:
            lock: a file descriptor that the process is to hold.

        Raises:
            ValueError: the fit has failed, and not because it diverged.
            KeyboardInterrupt: this process was told to end; the fit has saved where it is.
        """
        if self.folder.exists() and not self.resumable:
            shutil.rmtree(self.folder)  # broken off before there was anything to go on from
        self.folder.mkdir(parents=True, exist_ok=True)
        rate = {} if self.rate is None else {"model": {"init_args": {"optimizer": {"init_args": {"lr": self.rate}}}}}
        for name, content in ((OVERLAY, self.row.overlay), (DECIDED, merged(self.row.decided, rate))):
            write_text(self.folder / name, yaml.safe_dump(content, sort_keys=False))
        about, log = self._begun(), self.folder / LOG
        said_before = log.stat().st_size if log.is_file() else 0
        self._note(about)
        started = time.monotonic()
        try:
            status = supervised(self.command, log, lock)
            about["finished"] = status == 0 and (self.folder / RESULTS).is_file()
        finally:
            about["seconds"] += time.monotonic() - started
            self._note(about)
        if about["finished"]:
            return
        said = last_words(log, said_before)
        if not status:
            raise ValueError(f"{self.name}: the fit ended without a test; leave out what keeps it from one (see {log})")
        if LOWER_THE_RATE not in said:
            raise ValueError(f"{self.name}: the fit ended with status {status}: {said} (see {log})")
        self._note(about | {"failed": said})

    def _begun(self) -> dict[str, Any]:
        """What is to be known of the fit while it runs; it may go on from where it broke off."""
        before = self.about
        return {
            "tag": self.row.tag,
            "method": self.row.method,
            "seed": self.seed,
            "learning_rate": self.rate,
            "tasks": self.row.tasks,
            "adapter_parameters": self.row.parameters,
            "hash": digest(self.row, self.seed, self.rate),
            "commits": list(dict.fromkeys([*before.get("commits", ()), commit()])),
            "command": self.command,
            "seconds": before.get("seconds", 0.0),
        }

    def _note(self, about: dict[str, Any]) -> None:
        write_text(self.folder / ABOUT, json.dumps(about, indent=2) + "\n")


def supervised(command: Sequence[str], log: Path, lock: int) -> int:
    """Runs a command to its end; if this process is told to end, the command is, too, and given the time to save.

    Args:
        command: the command line.
        log: where all that it says is added.
        lock: a file descriptor that it is to hold.

    Returns:
        Its status.
    """
    with log.open("a") as stream:
        process = subprocess.Popen(
            command, stdout=stream, stderr=stream, stdin=subprocess.DEVNULL, process_group=0, pass_fds=[lock]
        )
        try:
            return process.wait()
        except KeyboardInterrupt:
            process.send_signal(signal.SIGTERM)
            raise
        finally:
            try:
                process.wait()
            except KeyboardInterrupt:  # once more: not willing to wait
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                raise


def last_words(log: Path, after: int = 0) -> str:
    """The last line of a log, behind so many bytes, that says anything; the one with the error if there is one."""
    text = log.read_bytes()[after:].decode(errors="replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    return (errors or lines or ["it said nothing"])[-1].removeprefix("error: ")
