"""A task's own head as two files: the backbone's formats know one head per model, this package one per task."""

import json
from pathlib import Path

from safetensors.torch import save_file

from moe_peft.backbones import Classifier
from moe_peft.methods.base import MultitaskModule


def write_head(module: MultitaskModule, task: int, folder: Path) -> None:
    """Writes `head.safetensors` (weight [C, D], bias [C]) and `head.json`, where the backbone is a classifier.

    Args:
        module: a method on its backbone.
        task: the task's id.
        folder: an existing folder.
    """
    if module.heads is None:
        return
    assert isinstance(module.backbone, Classifier)
    start, size = int(module.heads.offset[task]), module.heads.outputs[task]
    own = {name: value[start : start + size] for name, value in module.heads.linear.state_dict().items()}
    save_file({name: value.cpu().clone() for name, value in own.items()}, folder / "head.safetensors")
    spec = module.specs[task]
    about = {"task": spec.name, "kind": spec.kind, "labels": list(spec.choices), "pooling": module.backbone.pooled_by}
    (folder / "head.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
