"""The contrastive term of a tiny MoRE, and what it must be by loops over hooked inputs.

Shapes: B rows, S prompt and answer tokens, L decoder tokens, T = 2 tasks.
"""

import math
from typing import Any

from torch import Tensor

from moe_peft.batch import IGNORE_INDEX, Batch
from moe_peft.callbacks.task_contrast import TaskContrast
from moe_peft.methods.more import MoRE
from tests.tiny import build, come_alive, random_batch

KINDS = ["causal", "seq2seq", "classifier"]


def more(kind: str = "causal", batch: Batch | None = None, **options: Any) -> MoRE:
    """A MoRE in training mode whose every tensor is proved to act."""
    module = build(MoRE, kind, **{"rank": 4} | options)
    return come_alive(module, random_batch(kind=kind) if batch is None else batch).train()


def watch(module: MoRE, batch: Batch, callback: TaskContrast) -> TaskContrast:
    """Attaches a callback as a fit does."""
    callback.on_fit_start(None, module)
    callback.on_train_batch_start(None, module, batch, 0)
    return callback


def term(module: MoRE, batch: Batch, **options: Any) -> Tensor:
    """The contrastive term of a batch, weight 1, with its graph."""
    callback = watch(module, batch, TaskContrast(weight=1.0, **options))
    module.begin(batch)
    module.row_losses(batch)
    return callback.loss_terms(module, batch)["contrast"]


def inputs_of(module: MoRE, batch: Batch) -> dict[str, Tensor]:
    """What every adapted linear reads, by slot: [B, S or L, D] in fp64."""
    seen = {}
    hooks = [
        layer.register_forward_pre_hook(lambda layer, args: seen.update({layer.slot: args[0].detach().double()}))
        for layer in module.adapted.values()
    ]
    module.begin(batch)
    module.row_losses(batch)
    for hook in hooks:
        hook.remove()
    return seen


def tokens_that_count(kind: str, slot: str, batch: Batch) -> list[list[int]]:
    """Places of the tokens that count, a list per row, from the row's own lengths."""
    own = [row.nonzero().flatten().tolist() for row in batch["prompt_mask"]]
    if kind != "seq2seq" or not slot.startswith("decoder."):
        return own
    if "EncDecAttention" in slot and slot.endswith((".k", ".v")):
        return own
    return [list(range(int((row != IGNORE_INDEX).sum()))) for row in batch["labels"]]


def expected_losses(module: MoRE, batch: Batch, kind: str, how: str) -> dict[str, list[float]]:
    """-log softmax(cos / 0.05)[task] of every linear and row, by slot, by loops in fp64."""
    losses = {}
    for slot, x in inputs_of(module, batch).items():
        e = module.adapted[slot].router.task_embeddings().detach().double()
        losses[slot] = []
        for row, places in enumerate(tokens_that_count(kind, slot, batch)):
            h = {"first_token": x[row, places[0]], "mean": x[row, places].mean(0), "last_token": x[row, places[-1]]}[
                how
            ]
            scores = [float(h @ e[t] / h.norm() / e[t].norm()) / 0.05 for t in range(len(e))]
            highest = max(scores)
            total = highest + math.log(sum(math.exp(score - highest) for score in scores))
            losses[slot].append(total - scores[int(batch["task_id"][row])])
    return losses


def mean_of(losses: dict[str, list[float]]) -> float:
    """The mean over linears and rows."""
    rows = [loss for row in losses.values() for loss in row]
    return sum(rows) / len(rows)
