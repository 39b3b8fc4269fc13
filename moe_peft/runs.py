"""A trained module out of its checkpoint or adapter folder alone: no data, no trainer, no configuration file."""

from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError

from moe_peft.checkpoint import read_checkpoint
from moe_peft.counting import model_parser
from moe_peft.data.tasks import TaskSpec
from moe_peft.interop.adapter_folder import ABOUT, is_adapter_folder, read_adapter
from moe_peft.messages import one_line
from moe_peft.methods.base import MultitaskModule


def find_checkpoint(path: str | Path) -> Path:
    """Returns the checkpoint that a path means.

    Args:
        path: a checkpoint, a run's folder (its best checkpoint, or the last one where there is no best), or an exported
            adapter's folder.

    Raises:
        ValueError: a folder without checkpoints.
    """
    path = Path(path)
    if not path.is_dir() or is_adapter_folder(path):
        return path
    files = [path / "checkpoints" / f"{name}.ckpt" for name in ("best", "last")]
    found = [file for file in files if file.is_file()]
    if not found:
        raise ValueError(
            f"checkpoint: '{path}' holds no checkpoints/best.ckpt or last.ckpt, and no {ABOUT}; give a run, a "
            "checkpoint or an exported adapter"
        )
    return found[0]


def load_module(checkpoint: str | Path, backbone: str | None = None) -> MultitaskModule:
    """Rebuilds a trained module, in eval mode, on the CPU.

    Args:
        checkpoint: a checkpoint file, a run's folder or an adapter's (see `find_checkpoint`).
        backbone: where the backbone's files lie on this machine, if not where they lay in training.

    Raises:
        ValueError: no checkpoint, one that cannot stand alone, or another backbone than it was trained on.
    """
    path = find_checkpoint(checkpoint)
    content = read_saved(path)
    return fill(untrained(path, content, backbone), content)


def read_saved(path: Path) -> dict[str, Any]:
    """Reads a checkpoint file, or an adapter's folder as if it were one."""
    return read_adapter(path) if path.is_dir() else read_checkpoint(path, "checkpoint")


def fill(module: MultitaskModule, content: dict[str, Any]) -> MultitaskModule:
    """Gives an untrained module what a checkpoint of it holds, in eval mode.

    Raises:
        ValueError: another backbone than it was trained on.
    """
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
