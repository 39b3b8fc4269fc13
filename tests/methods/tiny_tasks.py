"""Methods that route by task, in fp64, one linear at a time."""

import torch

from tests.tiny import build, random_batch, randomise

SLOT = "layers.0.self_attn.k_proj"  # 32 to 16


def alive_layer(method, **arguments):
    """A method with random tensors in fp64, one of its linears, and inputs of mixed tasks that it knows of."""
    module = build(method, **arguments)
    randomise(module)
    module.double().eval()
    batch = random_batch()
    module.begin(batch)
    layer = next(layer for slot, layer in module.adapted.items() if slot.endswith(SLOT))
    torch.manual_seed(4)
    x = torch.randn(*batch["input_ids"].shape, layer.in_features, dtype=torch.float64)
    return module, layer, x, batch["task_id"].tolist()


def by_row(update, x, tasks):
    """The update of every row by itself: `update(task)` is a matrix [O, D]."""
    return torch.stack([row @ update(task).mT for row, task in zip(x, tasks, strict=True)])


def agrees(layer, x, expected):
    """Whether a linear's update is what was computed slowly, and not zero."""
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(layer.delta(x), expected, rtol=0, atol=1e-12)


def task_batch(task, **arguments):
    """A batch whose rows are all of one task."""
    batch = random_batch(**arguments)
    rows = len(batch["task_id"])
    return batch | {"task_id": torch.full_like(batch["task_id"], task), "task_share": torch.full((rows,), float(rows))}


def gradients(module, batch):
    """Every parameter's gradient of a training step's loss."""
    module.zero_grad()
    module.begin(batch)
    sum(module.step_losses(batch).values()).backward()
    return {name: own.grad.clone() for name, own in module.named_parameters() if own.requires_grad}
