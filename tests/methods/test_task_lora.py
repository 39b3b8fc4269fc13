"""One LoRA per task: as if every task had a model of its own."""

import pytest
import torch

from moe_peft.methods.lora import LoRA
from moe_peft.methods.task_lora import TaskLoRA
from tests.methods.tiny_tasks import gradients, task_batch
from tests.tiny import IGNORE_INDEX, batch_of, build, come_alive, logits, random_batch

OPTIONS = {"rank": 3, "alpha": 6.0}


def loras(module):
    """A LoRA for each task, with its factors."""
    found = []
    for task in range(2):
        lora = build(LoRA, **OPTIONS)
        for slot, layer in module.adapted.items():
            lora.adapted[slot].factors.A.data.copy_(layer.factors.A[task])
            lora.adapted[slot].factors.B.data.copy_(layer.factors.B[task])
        found.append(lora)
    return found


@pytest.fixture
def batch():
    """Three rows of task 0, one of task 1."""
    return random_batch() | {"task_id": torch.tensor([0, 0, 1, 0]), "task_share": torch.tensor([3.0, 3.0, 1.0, 3.0])}


def rows_of(batch, task):
    """The batch's rows of a task, by themselves."""
    rows = (batch["task_id"] == task).nonzero().flatten().tolist()
    prompts = [batch["input_ids"][row][batch["prompt_mask"][row]].tolist() for row in rows]
    answers = [batch["labels"][row][batch["labels"][row] != IGNORE_INDEX].tolist() for row in rows]
    return batch_of(prompts, answers)


def test_every_row_is_served_by_its_own_tasks_lora(batch):
    module = come_alive(build(TaskLoRA, **OPTIONS), batch).eval()
    with torch.no_grad():
        found, alone = logits(module, batch), [logits(lora.eval(), batch) for lora in loras(module)]
    assert (alone[0] - alone[1]).abs().max() > 1e-2
    for row, task in enumerate(batch["task_id"].tolist()):
        torch.testing.assert_close(found[row], alone[task][row], rtol=0, atol=1e-4)


def test_each_learns_as_if_alone(batch):
    module = come_alive(build(TaskLoRA, **OPTIONS), batch, scale=0.2)
    assert module.loss_mean == "task"
    joint = gradients(module, batch)
    for task, lora in enumerate(loras(module)):
        for name, gradient in gradients(lora, rows_of(batch, task)).items():
            torch.testing.assert_close(joint[name][task], gradient, rtol=1e-3, atol=1e-5)


def test_nothing_reaches_the_loras_of_other_tasks():
    module = come_alive(build(TaskLoRA, **OPTIONS), random_batch(), scale=0.2)
    for name, gradient in gradients(module, task_batch(1)).items():
        assert gradient[0].abs().max() == 0 < gradient[1].abs().max(), name


def test_each_is_clipped_by_its_own_norm(batch):
    module = come_alive(build(TaskLoRA, **OPTIONS), batch, scale=0.2)
    before = gradients(module, batch)

    def norms(found, task):
        return torch.stack([gradient[task].norm() for gradient in found.values()]).norm()

    bound = 0.5 * min(norms(before, task) for task in range(2)).item()
    module.configure_gradient_clipping(None, bound, "norm")
    after = {name: own.grad for name, own in module.named_parameters() if own.requires_grad}
    for task in range(2):
        torch.testing.assert_close(norms(after, task), torch.tensor(bound), rtol=1e-4, atol=0)
