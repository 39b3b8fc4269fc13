"""MTL-LoRA: transforms of rank space and mixtures of heads, both by task."""

import pytest
import torch

from moe_peft.methods.lora import LoRA
from moe_peft.methods.mtl_lora import MTLLoRA
from tests.methods.tiny_tasks import agrees, alive_layer, by_row, gradients, task_batch
from tests.tiny import TASKS, build, logits, random_batch, randomise

OPTIONS = {"experts": 3, "rank": 2, "alpha": 4.0}


def slow_update(layer, transforms):
    """The matrix of a task, head by head."""
    a, b, router = layer.factors.A, layer.factors.B, layer.router

    def update(task):
        g = torch.tensor([2.0 * score for score in router.logits[task].tolist()], dtype=torch.float64).exp()
        heads = ((g / g.sum())[e] * b[:, 2 * e : 2 * e + 2] for e in range(3))
        return 4 / 2 * sum(head @ transforms[task] @ a for head in heads)

    return update


def test_the_update_is_the_weighed_sum_of_the_heads_after_the_transform():
    _, layer, x, tasks = alive_layer(MTLLoRA, temperature=0.5, **OPTIONS)
    transforms = layer.router.transform
    assert not torch.allclose(transforms, transforms.mT)
    agrees(layer, x, by_row(slow_update(layer, transforms), x, tasks))


def test_a_diagonal_transform_is_a_full_one_with_that_diagonal():
    _, layer, x, tasks = alive_layer(MTLLoRA, transform="diagonal", temperature=0.5, **OPTIONS)
    agrees(layer, x, by_row(slow_update(layer, torch.diag_embed(layer.router.transform)), x, tasks))


def test_transforms_start_at_the_identity_and_weights_sharp():
    for transform, identity in (("full", torch.eye(2)), ("diagonal", torch.ones(2))):
        router = next(iter(build(MTLLoRA, transform=transform, **OPTIONS).adapted.values())).router
        assert torch.equal(router.transform, identity.expand_as(router.transform))
        assert 0.5 < router.weights().max() and router.logits.abs().max() <= 3**-0.5


@pytest.mark.parametrize("transform", ["full", "diagonal"])
def test_one_task_with_one_head_and_no_transform_is_a_lora(transform):
    module = build(MTLLoRA, tasks=TASKS[:1], transform=transform, **OPTIONS | {"experts": 1})
    lora, batch = build(LoRA, rank=2, alpha=4.0), task_batch(0)
    with torch.no_grad():
        for slot, layer in module.adapted.items():
            for own, other in zip(layer.factors.parameters(), lora.adapted[slot].factors.parameters(), strict=True):
                own.copy_(other.normal_())
        torch.testing.assert_close(logits(module.eval(), batch), logits(lora.eval(), batch), rtol=0, atol=1e-4)


def test_only_the_batches_tasks_learn():
    module = build(MTLLoRA, **OPTIONS)
    randomise(module, scale=0.2)
    found = {name: grad for name, grad in gradients(module, task_batch(1)).items() if ".router." in name}
    assert len(found) == 2 * len(module.adapted)
    for name, gradient in found.items():
        assert gradient[0].abs().max() == 0 < gradient[1].abs().max(), name


def test_with_one_head_its_weight_has_no_effect():
    module = build(MTLLoRA, **OPTIONS | {"experts": 1})
    randomise(module, scale=0.2)
    found = gradients(module, random_batch())
    assert all(grad.abs().max() == 0 for name, grad in found.items() if name.endswith("router.logits"))


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="^temperature: 0 must be above 0"):
        build(MTLLoRA, temperature=0)
    with pytest.raises(ValueError, match="^transform: 'half' is unknown; use full or diagonal$"):
        build(MTLLoRA, transform="half")
