"""Which checkpoint file a fit goes on from: the one that was meant, or one before it where that is cut off."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.utilities.rank_zero import rank_zero_only

from moe_peft.checkpoint import CutOffError, read_checkpoint

logger = logging.getLogger(__name__)


def previous_of(path: Path) -> Path:
    """Where the checkpoint is kept that was at `path` before."""
    return path.with_name(f"{path.stem}.previous{path.suffix}")


def checkpoint_files(path: str | None, folder: Path) -> list[Path]:
    """Gives the file that a `ckpt_path` means, and after it those to go on from where it is missing or cut off.

    Args:
        path: a file, "best", "last", "hpc" (what Lightning saved as it requeued a SLURM job), or None: "hpc" in a
            requeued job, nothing elsewhere.
        folder: the run folder.

    Raises:
        ValueError: "hpc" in a run folder that has no such file.
    """
    last = folder / "checkpoints" / "last.ckpt"
    if path == "hpc" or not path:
        saved = {int(file.stem.removeprefix("hpc_ckpt_")): file for file in folder.glob("hpc_ckpt_*.ckpt")}
        if not saved and path:
            raise ValueError(f"ckpt_path: 'hpc', but '{folder}' has no hpc_ckpt_*.ckpt; give a checkpoint, or last")
        if not saved or not (path or SLURMEnvironment.detect()):
            return []
        return [*(saved[number] for number in sorted(saved, reverse=True)), last, previous_of(last)]
    file = last.with_stem(path) if path in ("best", "last") else Path(path)
    return [file, previous_of(file)]


def read_first_whole(files: Sequence[Path]) -> tuple[Path, dict[str, Any]]:
    """Reads the first checkpoint that is whole, with a line if it is not the one that was meant.

    Raises:
        ValueError: none is whole (said of the first), or one was not written by this package.
    """
    faults: list[CutOffError] = []
    for file in files:
        try:
            content = read_checkpoint(file)
        except CutOffError as fault:
            faults.append(fault)
            continue
        if faults:
            step = content["global_step"]
            rank_zero_only(logger.warning)(
                "%s is missing or cut off: going on from the one before it, %s (step %d)", files[0], file, step
            )
        return file, content
    raise faults[0]
