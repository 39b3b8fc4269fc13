"""MOELoRA: experts weighed by a task's embedding."""

import pytest
import torch

from moe_peft.methods.moelora import MOELoRA
from tests.methods.tiny_tasks import agrees, alive_layer, by_row
from tests.tiny import build, come_alive, logits, random_batch

OPTIONS = {"experts": 3, "rank": 2, "alpha": 12.0, "embedding_dim": 5}


def test_the_update_is_the_weighed_sum_of_the_experts():
    _, layer, x, tasks = alive_layer(MOELoRA, **OPTIONS)
    a, b, router = layer.factors.A, layer.factors.B, layer.router

    def update(task):
        scores = torch.stack([torch.dot(row, router.embedding.weight[task]) for row in router.weight])
        g = scores.exp() / scores.exp().sum()
        return sum(12 / 6 * g[e] * b[:, 2 * e : 2 * e + 2] @ a[2 * e : 2 * e + 2] for e in range(3))

    agrees(layer, x, by_row(update, x, tasks))


def test_tasks_with_equal_embeddings_are_adapted_alike():
    batch = random_batch()
    module = come_alive(build(MOELoRA, **OPTIONS), batch).eval()
    other = batch | {"task_id": 1 - batch["task_id"]}
    with torch.no_grad():
        assert (logits(module, batch) - logits(module, other)).abs().max() > 1e-2
        for layer in module.adapted.values():
            layer.router.embedding.weight[1] = layer.router.embedding.weight[0]
        assert torch.equal(logits(module, batch), logits(module, other))


@pytest.mark.parametrize("task", [-1, 2])
def test_a_task_that_there_is_not_is_refused(task):
    batch = random_batch()
    with pytest.raises(ValueError, match=rf"task_id: {task} is no task; the 2 tasks are 0\.\.1$"):
        build(MOELoRA, **OPTIONS).begin(batch | {"task_id": torch.full_like(batch["task_id"], task)})


def test_rows_without_a_task_are_refused():
    batch = random_batch()
    del batch["task_id"]
    with pytest.raises(ValueError, match="^MOELoRA routes by task: the batch has no task_id; give .*$"):
        build(MOELoRA, **OPTIONS).begin(batch)


def test_an_embedding_without_width_is_refused():
    with pytest.raises(ValueError, match="^embedding_dim: 0 must be at least 1"):
        build(MOELoRA, embedding_dim=0)
