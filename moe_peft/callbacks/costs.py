"""What a fit costs: seconds of an optimizer step, and the most memory that was in use."""

import json
import resource
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from moe_peft.writing import write_text

FILE = "costs.json"


class Costs(Callback):
    """Writes <run>/costs.json: median seconds per optimizer step, and the peak of resident and device memory.

    A step lasts from the end of the one before to its own, collating included and validations left out; the first one
    after a start does not count. Memory is the process's own (rank zero's), from its start to the end of the fit.
    """

    def __init__(self) -> None:
        self._seconds: list[float] = []
        self._resident = self._device = 0
        self._mark: float | None = None
        self._step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begins anew, after a resume too."""
        self._mark, self._step = None, trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Takes the end of a step."""
        if trainer.global_step == self._step:
            return
        now = time.perf_counter()
        if self._mark is not None:
            self._seconds.append(now - self._mark)
        self._mark, self._step = now, trainer.global_step

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Notes how much of a step has passed."""
        self._passed = 0.0 if self._mark is None else time.perf_counter() - self._mark

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes the validation out of the step."""
        if self._mark is not None:
            self._mark = time.perf_counter() - self._passed

    def state_dict(self) -> dict[str, Any]:
        """What was measured so far, for a resumed fit."""
        self._read_memory()
        return {"seconds": list(self._seconds), "resident": self._resident, "device": self._device}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over what was measured before."""
        self._seconds = list(state_dict["seconds"])
        self._resident, self._device = state_dict["resident"], state_dict["device"]

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the file."""
        if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        self._read_memory()
        found = {
            "step_seconds": median(self._seconds) if self._seconds else None,
            "steps_timed": len(self._seconds),
            "peak_resident_bytes": self._resident,
            "peak_device_bytes": self._device,
        }
        write_text(Path(trainer.default_root_dir) / FILE, json.dumps(found, indent=2) + "\n")

    def _read_memory(self) -> None:
        self._resident = max(self._resident, peak_resident())
        if torch.cuda.is_available():
            self._device = max(self._device, torch.cuda.max_memory_allocated())


def peak_resident() -> int:
    """The most bytes that this process had resident."""
    status = Path("/proc/self/status")  # where there is one: what getrusage says begins at the parent's peak
    if status.is_file():
        peak = next((line for line in status.read_text().splitlines() if line.startswith("VmHWM:")), None)
        if peak is not None:
            return 1024 * int(peak.split()[1])
    return (1 if sys.platform == "darwin" else 1024) * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
