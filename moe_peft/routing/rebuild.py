"""The routing of a run, recorded from its checkpoint: what the run itself did not record, or not of so many rows."""

import logging
from collections.abc import Sequence
from pathlib import Path

import torch

from moe_peft.data.preview import load_data_module
from moe_peft.data.tasks import Split
from moe_peft.routing.recording import Place, record
from moe_peft.runs import find_checkpoint, load_module

logger = logging.getLogger(__name__)


def record_run(
    run: Path, splits: Sequence[Split] = ("validation", "test"), rows_per_task: int = 32, backbone: str | None = None
) -> None:
    """Writes `<run>/routing/` from the run's best checkpoint; does nothing for a method that routes nothing.

    The files are those of `RoutingReport`, and equal to them where the number of rows is the same; what they hold of
    other steps and splits stays.

    Args:
        run: the run's folder.
        splits: of which rows; the last one decides what is found fault with.
        rows_per_task: rows of every task and split, at most.
        backbone: where the backbone's files lie on this machine, if not where they lay in training.

    Raises:
        ValueError: no run with a checkpoint, or other tasks than it was trained on.
    """
    config = Path(run) / "config.yaml"
    if not config.is_file():
        raise ValueError(f"run: '{config}' is no file; name the folder of a run, which says where its tasks' rows are")
    path = find_checkpoint(run)
    place = [] if backbone is None else [f"--model.init_args.backbone.init_args.name={backbone}"]
    data, module = load_data_module([f"--config={config}", *place]), load_module(path, backbone)
    here, there = ([spec.name for spec in specs] for specs in (data.specs, module.specs))
    if here != there:
        raise ValueError(f"run: its configuration has tasks {here}, its checkpoint {there}; name a whole run")
    if not module.routes:
        return
    module.to("cuda" if torch.cuda.is_available() else "cpu")
    for split in splits:
        logger.info("recording the routing of %s on at most %d %s rows of every task", run, rows_per_task, split)
        found = record(module, data, split, rows_per_task, Place(), mapped=split == splits[-1])
        found.write(Path(run) / "routing", step_of(path), split)


def step_of(checkpoint: str | Path) -> int:
    """Returns the optimizer step of a checkpoint, of which no tensor is read."""
    return int(torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)["global_step"])
