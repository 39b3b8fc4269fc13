"""One more expert for a trained TT-LoRA MoE: its tensors grow by a row, its router learns one more name.

The new task is the last one. Experts and heads that were there keep every bit; what a router does for their rows may
change, so it is told. Shapes: B rows, d features, E experts, the new one included.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from moe_peft.batch import Batch
from moe_peft.methods.refusal import NO_LIMIT, threshold
from moe_peft.methods.task_rows import with_heads

if TYPE_CHECKING:
    from moe_peft.methods.tt_lora_moe import TTLoRAMoE

SETTLED_ANEW = ("router.gram", "null_below")
"""What may change of a mixture that gets one more expert, besides the rows that it gains."""


class Routed(NamedTuple):
    """How a task's rows find their expert, before and after the new one came."""

    task: str
    rows: int
    before: float | None
    """Share that was right; None for the new task."""
    after: float
    to_new: float
    """Share that goes to the new expert."""


def grown_state(module: "TTLoRAMoE", state: dict[str, Tensor], about: dict[str, Any]) -> dict[str, Tensor]:
    """Returns a checkpoint's state with one more expert, whose rows are zero.

    Args:
        module: built for all tasks.
        state: the checkpoint's tensors.
        about: the checkpoint's description of itself.
    """
    new = dict(with_heads(module, state, about))
    stacked = [
        f"model.{slot}.factors.{name}"
        for slot, layer in module.adapted.items()
        for name, _ in layer.factors.named_parameters()
    ]
    for name in (*stacked, *(f"router.{name}" for name in module.router.per_expert)):
        if name in state:  # a router without noise has none
            new[name] = torch.cat([state[name], torch.zeros_like(state[name][:1])])
    return new


def refuse_changed(module: "TTLoRAMoE", state: dict[str, Tensor]) -> None:
    """Checks that what a mixture had is in the grown one, bit by bit.

    Raises:
        RuntimeError: names what changed; nobody can cause it but a fault in this package.
    """
    now = module.adapter_state()
    for name, before in state.items():
        after = now[name][: len(before)] if before.dim() else now[name]
        if name not in SETTLED_ANEW and not torch.equal(after.cpu(), before):
            raise RuntimeError(f"growing changed {name}, which belongs to the experts that were there")


@torch.no_grad()
def learn_expert(module: "TTLoRAMoE", training: Sequence[Batch], validation: Sequence[Batch]) -> list[Routed]:
    """Lets the router learn the last expert, and tells what that did to the routing.

    A threshold of the null expert is settled anew, so that as large a share of all rows stays as of the old tasks'
    rows did before.

    Args:
        module: grown, its last expert in place, in eval mode.
        training: prompts of the tasks that the router learns from.
        validation: prompts of all tasks.
    """
    new = len(module.specs) - 1
    features, own = prompt_features(module, validation)
    old = own != new
    scores = module.router(features)
    scores[:, new] = float("-inf")  # as if it were not there
    before = module.choose(scores)
    sure = module.router.confidence(scores)[old]
    module.router.add(new, *prompt_features(module, training))
    scores = module.router(features)
    if module.null_below > NO_LIMIT:
        kept = (sure >= module.null_below).double().mean().item()
        module.null_below.fill_(threshold(module.router.confidence(scores), kept))
    after = module.choose(scores)
    found = []
    for task, spec in enumerate(module.specs):
        rows = own == task
        right = (before[rows] == task).double().mean().item() if task != new else None
        now = after[rows]
        shares = ((now == one).double().mean().item() for one in (task, new))
        found.append(Routed(spec.name, int(rows.sum()), right, *shares))
    return found


def prompt_features(module: "TTLoRAMoE", batches: Sequence[Batch]) -> tuple[Tensor, Tensor]:
    """Returns what the router reads of prompts, [n, d], and their tasks [n]."""
    features = torch.cat([module.prompt_features(batch) for batch in batches])
    return features, torch.cat([batch["task_id"] for batch in batches]).to(features.device)


def rows_to_learn(module: "TTLoRAMoE", rows: int | None) -> tuple[int, list[int]]:
    """Returns how many training rows of each task the router wants to see for its last expert, and of which tasks."""
    tasks = range(len(module.specs)) if module.router.learns_by_gradient else [len(module.specs) - 1]
    return rows or module.router.rows_to_add(), list(tasks)
