"""Adapter-only checkpoints that check themselves.

A checkpoint holds the adapters, routers, heads and priors, and under the key "moe_peft" a description of the method,
base and tasks it belongs to. It is always read with `weights_only=True`.
"""

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from moe_peft.methods.base import MultitaskModule

FORMAT = 1
# Where a model's files lie, and what computes its adapters, may differ from machine to machine; the fingerprints decide
# whether it is the same model.
LOCATION = ("init_args.kernels",) + tuple(
    f"init_args.{owner}.init_args.{name}"
    for owner, names in {
        "backbone": (
            *("name", "gguf_file", "sha256", "revision", "shape", "attention"),
            *("gradient_checkpointing", "offload_activations"),
        ),
        "embedder": ("name", "cache_dir"),
        "features": ("name", "cache_dir", "keep"),
    }.items()
    for name in names
)
# Arguments that play no part in evaluating a checkpoint, or only there.
TRAINING = tuple(
    f"init_args.{name}"
    for name in (
        "optimizer",
        "scheduler",
        "lr",
        "weight_decay",
        "loss_mean",
        "ranking",
        "max_new_tokens",
        "unknown_task",
        "routing",
        "cache_megabytes",
    )
)


def describe(module: "MultitaskModule") -> dict[str, Any]:
    """Returns the identity that a checkpoint carries: plain types only."""
    return {
        "format": FORMAT,
        "method": type(module).__name__,
        "backbone": module.backbone.describe(),
        "fingerprint": module.fingerprint,
        "embedder": module.embedder.fingerprint() if module.embedder is not None and module.fingerprint else "",
        "tasks": [task.name for task in module.specs],
        "specs": [asdict(task) for task in module.specs],
        "representation": module.representation,
        "config": module.config,
    }


class CutOffError(ValueError):
    """A checkpoint file that is missing or not whole, as a killed process may leave it."""


def read_checkpoint(path: str | Path, argument: str = "ckpt_path") -> dict[str, Any]:
    """Reads a checkpoint file onto the CPU.

    Args:
        path: the file.
        argument: whose value it is, for the error.

    Raises:
        CutOffError: no such file, or a truncated one.
        ValueError: one that may not be read, or that this package did not write.
    """
    path = Path(path)
    if not path.is_file():
        words = ", or the word best or last" if argument == "ckpt_path" else ""
        raise CutOffError(f"{argument}: {str(path)!r} is no file; give a checkpoint{words}")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError:
        raise ValueError(f"{argument}: {str(path)!r} may not be read; change its permissions") from None
    except Exception:  # torch raises a dozen kinds here: pickle, zip, EOF, runtime, and their texts help nobody
        raise CutOffError(
            f"{argument}: {str(path)!r} is truncated or no checkpoint: give a whole file written by `moe_peft fit`"
        ) from None
    if not isinstance(checkpoint, dict) or "moe_peft" not in checkpoint:
        raise ValueError(f"{argument}: {str(path)!r} is no moe_peft checkpoint: give a file written by `moe_peft fit`")
    return checkpoint


def refuse_foreign(checkpoint: dict[str, Any], here: dict[str, Any], tasks: bool = True) -> None:
    """Raises one line if a checkpoint belongs to another method, base or task list than the module at hand.

    Args:
        checkpoint: as read from a file.
        here: the description of the module at hand.
        tasks: whether the task lists must be the same.
    """
    there = checkpoint.get("moe_peft")
    if there is None:
        raise ValueError("the checkpoint was not written by moe_peft")
    for name, fix in (
        ("format", "use the version of moe_peft that wrote it"),
        ("method", "configure that method"),
        ("fingerprint", f"configure its backbone, {there['backbone']}"),
        ("embedder", "configure the embedder that its prior was fitted with"),
        ("tasks", "configure the same tasks in the same order"),
    ):
        if there[name] != here[name] and (tasks or name != "tasks"):
            raise ValueError(f"checkpoint of another {name}: it has {there[name]!r}, this run {here[name]!r}; {fix}")


def check_adapter_names(own: dict[str, Tensor], state: dict[str, Tensor]) -> None:
    """Compares the names of a checkpoint's tensors with those of the module's adapter tensors.

    Raises:
        ValueError: names the first difference and how many there are.
    """
    missing = sorted(own.keys() - state.keys())
    unexpected = sorted(state.keys() - own.keys())
    for what, names in (("lacks", missing), ("has unexpected", unexpected)):
        if names:
            raise ValueError(
                f"the checkpoint {what} {len(names)} tensors, first {names[0]!r}: "
                "it was made with other targets or options; use its own config.yaml"
            )


def check_adapter_state(own: dict[str, Tensor], state: dict[str, Tensor]) -> None:
    """Compares a checkpoint's tensors with the module's adapter tensors, by name and shape; its values must be finite.

    Raises:
        ValueError: names the first difference.
    """
    check_adapter_names(own, state)
    shapes = [name for name in own if own[name].shape != state[name].shape]
    if shapes:
        name = min(shapes)
        raise ValueError(
            f"the checkpoint's {name} has shape {list(state[name].shape)}, this run's {list(own[name].shape)}: "
            "another rank, number of experts or clusters; use its own config.yaml"
        )
    name = first_not_finite(state)
    if name is not None:
        raise ValueError(f"the checkpoint's {name} holds values that are not finite; use one from before they came")


def first_not_finite(state: dict[str, Tensor]) -> str | None:
    """Names the first tensor with values that are not finite, if there is one."""
    floats = ((name, value) for name, value in state.items() if value.is_floating_point())
    return next((name for name, value in floats if not torch.isfinite(value).all()), None)


def conflicts(there: Any, here: Any, free: Iterable[str] = (), prefix: str = "") -> list[str]:
    """Lists the dotted names at which two plain configurations differ, with both values.

    What only `here` knows is an argument younger than the checkpoint, and no conflict.

    Args:
        there: the checkpoint's configuration.
        here: this run's.
        free: names that may differ, with all that is below them.
        prefix: the name of what is compared.
    """
    if prefix in free or there == here:
        return []
    if isinstance(there, dict) and isinstance(here, dict):
        found = []
        for key in sorted(there, key=str):
            found += conflicts(there.get(key), here.get(key), free, f"{prefix}.{key}" if prefix else str(key))
        return found
    return [f"{prefix} is {here!r} here and {there!r} in the checkpoint"]


def plain_model_config(config: Any) -> dict[str, Any]:
    """Returns the model section as plain types (what a checkpoint stores and compares)."""
    model = config["model"].as_dict() if hasattr(config["model"], "as_dict") else dict(config["model"])
    model.get("init_args", {}).pop("tasks", None)
    return model
