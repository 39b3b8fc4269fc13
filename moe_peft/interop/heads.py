"""A task's own head as two files: the backbone's formats know one head per model, this package one per task."""

from pathlib import Path
from typing import NamedTuple

from safetensors.torch import save_file
from torch import Tensor

from moe_peft.backbones import Classifier
from moe_peft.interop.files import read_json, read_tensors, write_json
from moe_peft.methods.base import MultitaskModule
from moe_peft.sharding import edited


class Head(NamedTuple):
    """A task's head, and what its outputs mean."""

    weight: Tensor
    """[C, D]."""
    bias: Tensor
    """[C]."""
    kind: str
    choices: tuple[str, ...]
    pooling: str
    """How features are pooled: "cls", "mean" or "last"."""


def own_head(module: MultitaskModule, task: int) -> Head | None:
    """Returns a copy of a task's head; None where the backbone is no classifier."""
    if module.heads is None:
        return None
    assert isinstance(module.backbone, Classifier)
    rows = slice(start := int(module.heads.offset[task]), start + module.heads.outputs[task])
    weight, bias = (own.detach()[rows].cpu().clone() for own in (module.heads.linear.weight, module.heads.linear.bias))
    spec = module.specs[task]
    return Head(weight, bias, spec.kind, spec.choices, module.backbone.pooled_by)


def write_head(module: MultitaskModule, task: int, folder: Path) -> None:
    """Writes `head.safetensors` (weight [C, D], bias [C]) and `head.json`, where the backbone is a classifier.

    Args:
        module: a method on its backbone.
        task: the task's id.
        folder: an existing folder.
    """
    head = own_head(module, task)
    if head is None:
        return
    save_file({"weight": head.weight, "bias": head.bias}, folder / "head.safetensors")
    about = {"task": module.specs[task].name, "kind": head.kind, "labels": list(head.choices), "pooling": head.pooling}
    write_json(folder / "head.json", about)


def read_head(folder: Path) -> tuple[str, Head] | None:
    """Returns the task's name and the head that `write_head` wrote; None where a folder has none.

    Raises:
        ValueError: files that are truncated or were written by something else.
    """
    file = folder / "head.json"
    if not file.is_file():
        return None
    about, tensors = read_json(file), read_tensors(folder / "head.safetensors")
    try:
        head = Head(tensors["weight"], tensors["bias"], about["kind"], tuple(about["labels"]), about["pooling"])
        return about["task"], head
    except (KeyError, TypeError) as error:
        raise ValueError(f"'{file}' lacks {error} or describes no head; export the folder again") from None


def check_head(module: MultitaskModule, head: Head, task: int, where: str) -> None:
    """Refuses a head that does not fit a classifier's task; changes nothing.

    Args:
        module: built, on a classifier.
        head: what was read.
        task: the id of the task whose head it shall be.
        where: what to call it.

    Raises:
        ValueError: another pooling, or another size.
    """
    assert module.heads is not None and isinstance(module.backbone, Classifier)
    if head.pooling != module.backbone.pooled_by:
        raise ValueError(
            f"{where} pools by {head.pooling!r}, the backbone here by {module.backbone.pooled_by!r}; set it so"
        )
    shape = module.heads.outputs[task], module.heads.linear.in_features
    if tuple(head.weight.shape) != shape or tuple(head.bias.shape) != shape[:1]:
        raise ValueError(f"{where}: its head has shape {[*head.weight.shape]}, not {[*shape]}; another base")


def install_head(module: MultitaskModule, head: Head, task: int) -> None:
    """Copies a head that fits into a task's rows; the other heads stay as they are."""
    assert module.heads is not None
    rows = module.heads.owner == task
    for own, given in ((module.heads.linear.weight, head.weight), (module.heads.linear.bias, head.bias)):
        with edited(own) as value:
            value[rows] = given.to(value)
