"""A checkpoint's task rows, brought to another task list: rows are matched by task name.

Methods that route by task keep one row per task in task embeddings and in the experts they started with; classifier
heads keep one output per class of a task. Nothing else of a checkpoint depends on the task list. Shapes: T tasks,
d embedding width.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from moe_peft.data.tasks import TaskSpec
from moe_peft.layers.rank_selector import RankSelector, TaskEmbedding, rank_selectors
from moe_peft.methods.heads import outputs_of
from moe_peft.sharding import whole

if TYPE_CHECKING:
    from moe_peft.methods.base import MultitaskModule

NEW = -1
"""Source of a row that the checkpoint does not have."""


def sources(there: list[str], here: list[str]) -> list[int]:
    """Returns for every task of this run its row in the checkpoint, or NEW.

    Args:
        there: the checkpoint's tasks.
        here: this run's.
    """
    return [there.index(name) if name in there else NEW for name in here]


def task_tables(module: "MultitaskModule", state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the task embeddings [T, d] out of a checkpoint's state, by adapted linear; none for other methods."""
    tables = {}
    for slot, selector in rank_selectors(module.adapted).items():
        own = selector.embedding is not None
        tables[slot] = state[f"model.{slot}.router.embedding.weight" if own else "task_embedding.weight"]
    return tables


def with_rows(module: "MultitaskModule", state: dict[str, Tensor], rows: list[int]) -> dict[str, Tensor]:
    """Returns a checkpoint's state with its task rows rearranged; the state itself stays as it is.

    A NEW row is the mean of all rows of the checkpoint. The expert that it starts with is the one which its row
    chooses, or without a gate the one that this module drew.

    Args:
        module: built; its parameters name the tables.
        state: the checkpoint's tensors.
        rows: the source of every row (see `sources`).
    """
    new = dict(state)
    for name, part in module.named_modules():
        if isinstance(part, TaskEmbedding):
            table = state[f"{name}.weight"]
            new[f"{name}.weight"] = torch.cat([table, table.mean(0, keepdim=True)])[rows]  # NEW is the last row
    tables = task_tables(module, new)
    for slot, router in rank_selectors(module.adapted).items():
        table, prefix = tables[slot], f"model.{slot}.router"
        if router.weight is not None:
            fresh = nn.functional.linear(table, state[f"{prefix}.weight"], state[f"{prefix}.bias"]).argmax(-1)
        else:
            fresh = router.start.to(table.device)
        before = state[f"{prefix}.start"]
        new[f"{prefix}.start"] = torch.stack([fresh[i] if at == NEW else before[at] for i, at in enumerate(rows)])
    return new


def with_heads(module: "MultitaskModule", state: dict[str, Tensor], about: dict[str, Any]) -> dict[str, Tensor]:
    """Returns a checkpoint's state with its classifier heads in this run's order; a new task's head is the module's.

    Args:
        module: built.
        state: the checkpoint's tensors.
        about: the checkpoint's description of itself.

    Raises:
        ValueError: a task of the checkpoint has other classes here, so that its head would mean something else.
    """
    if module.heads is None:
        return state
    if about.get("specs") is None:
        raise ValueError("the checkpoint does not say what its heads' classes are; resume it with this version first")
    offsets, start = {}, 0
    for spec in map(TaskSpec.from_saved, about["specs"]):
        offsets[spec.name] = spec, start
        start += outputs_of(spec)
    new = dict(state)
    for name in ("heads.linear.weight", "heads.linear.bias"):
        fresh = whole(module.heads.get_parameter(name.removeprefix("heads.")))
        parts = []
        for spec, own in zip(module.specs, fresh.split(module.heads.outputs), strict=True):
            known, at = offsets.get(spec.name, (None, 0))
            if known is not None and (known.kind, known.choices) != (spec.kind, spec.choices):
                raise ValueError(
                    f"task {spec.name!r} is {spec.kind} of {list(spec.choices)} here and {known.kind} of "
                    f"{list(known.choices)} in the checkpoint, where its head was trained; give the same classes"
                )
            parts.append(own if known is None else state[name][at : at + len(own)].to(own.device))
        new[name] = torch.cat(parts)
    return new


def resize(module: "MultitaskModule", rows: int) -> None:
    """Gives every task table of a built module so many rows, for the state of `with_rows`."""
    for part in module.modules():
        if isinstance(part, TaskEmbedding):
            part.weight = nn.Parameter(part.weight.new_zeros(rows, part.weight.shape[1]))
        elif isinstance(part, RankSelector):
            part.start = part.start.new_zeros(rows)
