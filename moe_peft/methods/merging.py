"""Folding a task's adapters into the base weights and taking them out again, to the bit.

A merged model costs what the bare base costs. It serves one task where the method's cores depend on the task (MoRE),
every task where there is no core (LoRA), and no method whose cores depend on the input (T-REX) can be merged at all.
"""

from typing import TYPE_CHECKING

from torch import Tensor

from moe_peft.batch import Batch
from moe_peft.layers.adapted import AdaptedLinear

if TYPE_CHECKING:
    from moe_peft.methods.base import MultitaskModule


def task_number(module: "MultitaskModule", task: str | int) -> int:
    """Returns the id of a task given by name or id.

    Raises:
        ValueError: there is no such task.
    """
    names = [spec.name for spec in module.specs]
    known = task in names if isinstance(task, str) else 0 <= task < len(names)
    if not known:
        listed = ", ".join(f"{name} ({number})" for number, name in enumerate(names))
        raise ValueError(f"task: there is no task {task!r}; use one of {listed}")
    return names.index(task) if isinstance(task, str) else task


def static_cores(module: "MultitaskModule", task: str | int | None) -> dict[str, Tensor | None]:
    """Returns the fixed core of every adapted linear for a task: [R], [Q, R] or None (identity), by linear.

    Args:
        module: a method on its backbone.
        task: by name or id; None is enough for a method that treats all tasks alike.

    Raises:
        ValueError: no adapters; cores that depend on the input, or on a task that was not given; or no such task.
    """
    module.built()
    if not module.adapted:
        raise ValueError(
            f"{type(module).__name__} cannot be merged or exported as a LoRA: it has no adapters; its base is as it was"
        )
    number = None if task is None else module.mergeable_task(task)
    cores: dict[str, Tensor | None] = dict.fromkeys(module.adapted)
    for slot, layer in module.adapted.items():
        if not layer.depends_on_task:
            continue
        try:  # without a task too, so that a method that reads its input is told that first
            cores[slot] = layer.fixed_core(number or 0)
        except ValueError as error:
            raise ValueError(f"{type(module).__name__} cannot be merged or exported as a LoRA: {error}") from None
        if number is None:
            names = ", ".join(spec.name for spec in module.specs)
            raise ValueError(f"task: {type(module).__name__} adapts each task in its own way; name one of {names}")
    return cores


def merged_layers(module: "MultitaskModule") -> list[AdaptedLinear]:
    """Lists the adapted linears that are merged: all of them, or none."""
    return [layer for layer in module.adapted.values() if layer.merged]


def merge(module: "MultitaskModule", task: str | int | None = None) -> None:
    """Merges every adapted linear for a task, or none if anything goes wrong; see `MultitaskModule.merge`."""
    if merged_layers(module):
        raise ValueError(f"{_merged_for(module)} is merged already: call unmerge() before merging again")
    cores, number = static_cores(module, task), None if task is None else task_number(module, task)
    try:
        for slot, core in cores.items():
            module.adapted[slot].merge(core, number or 0)
    except BaseException:  # out of memory, or an interrupt: a half-merged model would answer with nobody's weights
        for layer in merged_layers(module):
            layer.unmerge()
        raise
    depends = any(layer.depends_on_task for layer in module.adapted.values())
    module.merged_task = number if depends else None


def unmerge(module: "MultitaskModule") -> None:
    """Restores every base weight; see `MultitaskModule.unmerge`."""
    layers = merged_layers(module)
    if not layers:
        raise ValueError("the model is not merged: there is nothing to take back")
    for layer in layers:
        layer.unmerge()
    module.merged_task = None


def refuse_other_tasks(module: "MultitaskModule", batch: Batch) -> None:
    """Refuses a batch with rows of another task than the merged one (the bare base serves every task)."""
    merged = module.merged_task
    if merged is None or not module.context.enabled or "task_id" not in batch:
        return
    others = [task for task in batch["task_id"].tolist() if task != merged]
    if others:
        known = 0 <= others[0] < len(module.specs)
        other = f"task {module.specs[others[0]].name!r}" if known else f"task id {others[0]}"
        raise ValueError(f"a batch with rows of {other} while {_merged_for(module)} is merged: call unmerge() first")


def _merged_for(module: "MultitaskModule") -> str:
    return "the model" if module.merged_task is None else f"task {module.specs[module.merged_task].name!r}"
