"""A trained module out of its checkpoint alone: no data, no trainer, no configuration file."""

from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError

from moe_peft.checkpoint import read_checkpoint
from moe_peft.counting import model_parser
from moe_peft.data.tasks import TaskSpec
from moe_peft.messages import one_line
from moe_peft.methods.base import MultitaskModule


def find_checkpoint(path: str | Path) -> Path:
    """Returns the checkpoint file that a path means.

    Args:
        path: a checkpoint, or a run's folder: its best checkpoint, or the last one where there is no best.

    Raises:
        ValueError: a folder without checkpoints.
    """
    path = Path(path)
    if not path.is_dir():
        return path
    files = [path / "checkpoints" / f"{name}.ckpt" for name in ("best", "last")]
    found = [file for file in files if file.is_file()]
    if not found:
        raise ValueError(
            f"checkpoint: '{path}' holds no checkpoints/best.ckpt or last.ckpt; give a run or a checkpoint"
        )
    return found[0]


def load_module(checkpoint: str | Path, backbone: str | None = None) -> MultitaskModule:
    """Rebuilds a trained module, in eval mode, on the CPU.

    Args:
        checkpoint: a checkpoint file, or a run's folder (see `find_checkpoint`).
        backbone: where the backbone's files lie on this machine, if not where they lay in training.

    Raises:
        ValueError: no checkpoint, one that cannot stand alone, or another backbone than it was trained on.
    """
    path = find_checkpoint(checkpoint)
    content = read_checkpoint(path, "checkpoint")
    module = untrained(path, content, backbone)
    module.on_load_checkpoint(content)
    module.load_state_dict(content["state_dict"])
    return module.eval()


def untrained(
    path: Path, content: dict[str, Any], backbone: str | None = None, specs: list[TaskSpec] | None = None
) -> MultitaskModule:
    """Makes the module that a checkpoint is of, as it was before training and before anything is loaded.

    Args:
        path: the checkpoint, for the errors.
        content: what it holds.
        backbone: see `load_module`.
        specs: its tasks; the checkpoint's own where not given.

    Raises:
        ValueError: a checkpoint that cannot stand alone.
    """
    about = content["moe_peft"]
    for name, what in (("config", "the model's configuration"), ("specs", "its tasks' specifications")):
        if about.get(name) is None:
            raise ValueError(
                f"checkpoint: '{path}' lacks {what}; train or resume it with `moe_peft fit` of this version"
            )
    model = about["config"]
    if backbone is not None:
        model["init_args"]["backbone"]["init_args"]["name"] = str(backbone)
    parser = model_parser()
    try:
        config = parser.parse_object({"model": model})
    except ArgumentError as error:
        raise ValueError(f"checkpoint: '{path}' has a model that is unknown here: {one_line(str(error))}") from None
    config.model.init_args["tasks"] = specs or [TaskSpec.from_saved(spec) for spec in about["specs"]]
    module: MultitaskModule = parser.instantiate_classes(config)["model"]
    module.config = model
    return module
