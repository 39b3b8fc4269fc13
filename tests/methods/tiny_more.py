"""Tiny MoRE modules in fp64 and batches for them, shared by the tests of the method."""

import torch

from moe_peft.data.tasks import TaskSpec
from moe_peft.methods.more import MoRE
from tests.tiny import build, come_alive, random_batch

KINDS = ["causal", "seq2seq", "classifier"]
SCALINGS = ["rank_over_r", "paper", "none", "code"]
R = 4


def tasks_of(count):
    return [TaskSpec(f"task{i}", "classification", "accuracy", "{text}", ("bad", "good")) for i in range(count)]


def batch_for(module, kind="causal", rows=None, seed=3):
    """A batch whose rows cycle through the module's tasks."""
    tasks = len(module.specs)
    batch = random_batch(rows or max(4, tasks), kind, seed)
    batch["task_id"] = torch.arange(len(batch["row_id"])) % tasks
    return batch


def more(kind="causal", **options):
    """A MoRE in fp64 (but for heads) whose every tensor is proved to act, and its batch."""
    module = build(MoRE, kind, **{"rank": R} | options).double()
    if module.heads is not None:
        module.heads.float()
    batch = batch_for(module, kind)
    return come_alive(module, batch), batch


def of_task(batch, task):
    return batch | {"task_id": torch.full_like(batch["task_id"], task)}


def answer(model, batch):
    """What a plain or PEFT model gives for a batch."""
    found = model(**{name: batch[name] for name in ("input_ids", "attention_mask", "labels") if name in batch})
    return found.logits if hasattr(found, "logits") else found.last_hidden_state


def rank_of(module, ranks):
    """Forces the rank of every task, one list for all linears."""
    for selector in module.selectors().values():
        selector.fix(torch.tensor([module.expert_ranks.index(rank) for rank in ranks]))


def agree(one, other, tolerance=1e-9):
    torch.testing.assert_close(one, other, rtol=0, atol=tolerance)
