"""A task merged into a plain model folder that `transformers` loads and knows nothing of adapters."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from torch import nn

from moe_peft.interop.folder import new_folder
from moe_peft.interop.heads import write_head
from moe_peft.layers.injection import place
from moe_peft.methods.base import MultitaskModule
from moe_peft.methods.merging import task_number


@contextlib.contextmanager
def plain_model(module: MultitaskModule) -> Iterator[nn.Module]:
    """Within: the model with its own linears in the adapted ones' places, merged or not, under their old names."""
    model = module.built()

    place(model, {slot: layer.base for slot, layer in module.adapted.items()})
    try:
        yield model
    finally:
        place(model, module.adapted)


def export_merged(module: MultitaskModule, folder: str | Path, task: str | int) -> None:
    """Writes model, tokenizer and, for classifiers, the task's head (`head.safetensors`, `head.json`).

    Args:
        module: a method whose cores do not depend on the input, not merged; it is unmerged again afterwards.
        folder: where to; no such path yet, or an empty folder.
        task: by name or id.

    Raises:
        ValueError: merged already, no such task, cores that depend on the input, or a folder that holds something.
    """
    with new_folder(folder) as new:
        module.merge(task)
        try:
            with plain_model(module) as model:
                model.save_pretrained(new)  # type: ignore[operator]
        finally:
            module.unmerge()
        module.backbone.tokenizer().save_pretrained(new)
        write_head(module, task_number(module, task), new)
