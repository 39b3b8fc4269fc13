"""Polytropon and MHR: as Hugging Face PEFT's PolyModel, on every path."""

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.distributions import Distribution, RelaxedBernoulli

from moe_peft.layers.task_routers import SkillRouter
from moe_peft.methods.poly import Poly
from moe_peft.methods.scoring import position_ids
from tests.methods.tiny_tasks import agrees, alive_layer, by_row, gradients
from tests.tiny import build, come_alive, logits, random_batch, tiny_backbone

OPTIONS = {"experts": 3, "rank": 2, "alpha": 1.0}


def as_peft(module, splits):
    """PEFT's model of the same base and tensors."""
    from peft import PolyConfig, get_peft_model

    torch.manual_seed(0)
    names = sorted({slot.rpartition(".")[2] for slot in module.adapted})
    config = PolyConfig(r=2, n_tasks=2, n_skills=3, n_splits=splits, target_modules=names, task_type="CAUSAL_LM")
    model = get_peft_model(module.backbone.load(), config)
    with torch.no_grad():
        for slot, layer in module.adapted.items():
            theirs = model.base_model.model.get_submodule(slot)
            a, b = layer.factors.A.unflatten(-1, (splits, -1)), layer.factors.B.unflatten(1, (splits, -1))
            theirs.poly_lora_A["default"].copy_(a.permute(2, 0, 3, 1))
            theirs.poly_lora_B["default"].copy_(b.permute(1, 0, 3, 2))
            theirs.poly_router["default"].module_logits.copy_(layer.router.logits)
    return model


@pytest.mark.parametrize("training", [False, True], ids=["evaluating", "training"])
@pytest.mark.parametrize("splits", [1, 4])
def test_it_is_pefts_poly_draws_included(splits, training):
    batch = random_batch()
    module = come_alive(build(Poly, splits=splits, **OPTIONS), batch, scale=1.0).train(training)
    theirs = as_peft(module, splits).train(training)
    mask = batch["attention_mask"]
    inputs = {"input_ids": batch["input_ids"], "attention_mask": mask, "position_ids": position_ids(mask)}
    with torch.no_grad():
        torch.manual_seed(7)
        expected = theirs(**inputs, task_ids=batch["task_id"]).logits
        torch.manual_seed(7)
        torch.testing.assert_close(logits(module, batch), expected, rtol=1e-4, atol=1e-4)
        torch.manual_seed(8)
        again = logits(module, batch)
    assert ((again - expected).abs().max() > 1e-2) == training


@pytest.mark.parametrize("splits", [1, 4])
def test_the_update_is_made_of_mixed_parameters(splits):
    _, layer, x, tasks = alive_layer(Poly, splits=splits, **OPTIONS)
    z = layer.router.logits.sigmoid().view(2, splits, 3)
    w = z / z.sum(-1, keepdim=True)

    def mixture(task, stacked):  # [E, size, rank]
        parts = [part.unbind() for part in stacked.chunk(splits, 1)]
        mixed = [sum(g * own for g, own in zip(w[task, q], part, strict=True)) for q, part in enumerate(parts)]
        return torch.cat(mixed)

    def update(task):
        return 1 / 2 * mixture(task, layer.factors.B) @ mixture(task, layer.factors.A.mT).mT

    agrees(layer, x, by_row(update, x, tasks))


def test_equal_logits_are_the_lora_of_mean_parameters_not_of_mean_products():
    _, layer, x, tasks = alive_layer(Poly, **OPTIONS)
    with torch.no_grad():
        layer.router.logits.fill_(0.4)
        mean = layer.factors.B.mean(0) @ layer.factors.A.mean(0)
        agrees(layer, x, by_row(lambda task: mean / 2, x, tasks))
        products = (layer.factors.B @ layer.factors.A).mean(0) / 2
        assert (layer.delta(x) - by_row(lambda task: products, x, tasks)).abs().max() > 0.1


def test_every_row_has_a_draw_of_its_own():
    module = build(Poly, **OPTIONS)
    router = next(iter(module.adapted.values())).router
    drawn = router.weights(torch.zeros(2, dtype=torch.int64), drawn=True)
    assert (drawn[0] - drawn[1]).abs().max() > 1e-3
    torch.testing.assert_close(drawn.sum(-1), torch.ones(2, 1))


def test_recomputation_under_gradient_checkpointing_sees_the_same_draw():
    batch, found = random_batch(), []
    for checkpointing in (False, True):
        module = build(Poly, backbone=tiny_backbone(gradient_checkpointing=checkpointing), **OPTIONS)
        come_alive(module, batch, scale=1.0).train()
        torch.manual_seed(5)
        found.append(gradients(module, batch))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)


def test_weights_of_skills_have_a_learning_rate_of_their_own():
    module = build(Poly, scheduler=None, optimizer=lambda groups: torch.optim.AdamW(groups, lr=1e-3), **OPTIONS)
    rates = {group["name"]: group["lr"] for group in module.configure_optimizers().param_groups}
    assert rates == {"adapters": 1e-3, "routers": 0.1}


def test_a_split_that_does_not_divide_a_linear_is_named():
    with pytest.raises(
        ValueError, match=r"^splits: 5 does not divide \S+_proj, 32 to 32; give a divisor of both[^\n]*$"
    ):
        build(Poly, splits=5)
    with pytest.raises(ValueError, match="^splits: 0 must be at least 1"):
        build(Poly, splits=0)


def test_the_routing_is_shown_skill_by_skill():
    batch = random_batch()
    module = come_alive(build(Poly, splits=4, **OPTIONS), batch, scale=1.0).eval()
    module.context.recording = True
    with torch.no_grad():
        module(batch)
    (weights, _), layer = next(iter(module.context.records.values())), next(iter(module.adapted.values()))
    assert weights.shape == (4, 1, 3)
    expected = layer.router.weights(batch["task_id"], drawn=False).mean(1, keepdim=True)
    torch.testing.assert_close(weights, expected)


def test_weights_are_relaxed_bernoulli_draws_and_nobody_looks_at_them(monkeypatch):
    monkeypatch.setattr(Distribution, "_validate_args", True)
    router, tasks = SkillRouter(3, 4, 2), torch.tensor([0, 2])
    torch.nn.init.normal_(router.logits)
    torch.manual_seed(1)
    drawn = router.weights(tasks, drawn=True)
    torch.manual_seed(1)
    z = RelaxedBernoulli(torch.ones(()), logits=router.logits[tasks].unflatten(-1, (2, -1))).rsample()
    torch.testing.assert_close(drawn, z / z.sum(-1, keepdim=True))
    with FakeTensorMode():  # where a look is an error, as it makes a GPU wait
        assert SkillRouter(3, 4, 2).weights(torch.zeros(2, dtype=torch.long), drawn=True).shape == (2, 2, 4)
