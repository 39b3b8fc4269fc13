"""TT-LoRA MoE learning: what reaches experts, heads and router, and that one run of all experts is a run of each.

Numbers in test names are those of the method's list of properties.
"""

import pytest
import torch
from torch.nn.utils import clip_grad_norm_

from moe_peft.layers.expert_router import LinearRouter
from moe_peft.methods import base
from moe_peft.methods.expert_clipping import clip_per_expert
from moe_peft.methods.training import task_loss
from moe_peft.optim import parameter_groups
from tests.methods.tiny_more import agree
from tests.methods.tiny_tt import KINDS, alone, moe, rows_for, send, take, with_tasks
from tests.tiny import output

STAGE_ONE, STAGE_TWO = frozenset({"routers"}), frozenset({"adapters", "heads", "gates"})
STEPS = 30


def pooled(backbone, model, batch):
    """What heads read, not cut to fp32."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    return backbone.pool(model(**inputs).last_hidden_state, batch["attention_mask"])


# ---- one run of all experts equals a run of each ---------------------------------------------------------------------


def optimizer_of(module):
    groups = parameter_groups(module)
    return torch.optim.AdamW([*groups["adapters"], *groups.get("heads", [])], lr=1e-2, weight_decay=0.1)


def one_run(module, batches, clip):
    """Trains all experts at once."""
    optimizer = optimizer_of(module)
    for batch in batches:
        module.begin(batch)
        optimizer.zero_grad()
        sum(module.step_losses(batch).values()).backward()
        clip(module)
        optimizer.step()


def run_of_one(single, batches, bound):
    """Trains a plain TT-LoRA on the mean loss of its own rows, as torch clips it; returns how often that bit."""
    optimizer, parameters, bitten = optimizer_of(single), [p for p in single.parameters() if p.requires_grad], 0
    for batch in batches:
        optimizer.zero_grad()
        single(batch).mean().backward()
        bitten += int(clip_grad_norm_(parameters, bound) > bound)
        optimizer.step()
    return bitten


def differences(joint, singles):
    """The largest difference of any core or head number, joint run against single runs."""
    found = []
    for expert, single in enumerate(singles):
        there, here = alone(joint, expert).adapter_state(), single.adapter_state()
        assert there.keys() == here.keys()
        found += [(there[name] - value).abs().max().item() for name, value in here.items()]
    return max(found)


def trained_both_ways(kind, clip, monkeypatch, bound=0.2):
    joint = moe(kind, router=LinearRouter(noise=False))
    if joint.heads is not None:
        joint.heads.double()
        monkeypatch.setattr(base, "pooled_features", pooled)
    joint.train().closed_groups = STAGE_ONE
    singles = [alone(joint, expert).train() for expert in range(3)]
    start = alone(joint, 0).adapter_state()
    batches = [rows_for(kind, 6, seed) for seed in range(STEPS)]
    one_run(joint, batches, clip)
    for expert, single in enumerate(singles):
        own = [with_tasks(take(batch, expert, expert + 3), 0, 0) for batch in batches]
        bitten = run_of_one(single, own, bound)
        assert bitten > STEPS / 2, "a bound that never bites proves nothing"
    moved = max((value - start[name]).abs().max().item() for name, value in singles[0].adapter_state().items())
    assert moved > 0.05
    return joint, singles


@pytest.mark.parametrize("kind", KINDS)
def test_experts_trained_side_by_side_are_those_trained_one_by_one(monkeypatch, kind):
    """30 clipped AdamW steps with decay: cores, and heads where there are some, to 1e-10."""
    joint, singles = trained_both_ways(kind, lambda module: clip_per_expert(module, 0.2), monkeypatch)
    assert differences(joint, singles) < 1e-10


@pytest.mark.parametrize("kind", KINDS)
def test_one_norm_for_all_would_couple_them(monkeypatch, kind):
    """Else the test above could not fail."""

    def clip_together(module):
        clip_grad_norm_([p for p in module.parameters() if p.grad is not None], 0.2)

    assert differences(*trained_both_ways(kind, clip_together, monkeypatch)) > 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_the_task_loss_is_the_sum_of_the_tasks_own_means(kind):
    module, batch = moe(kind).train(), rows_for(kind, 7)
    module.closed_groups = STAGE_ONE
    losses = module(batch)
    expected = sum(losses[torch.arange(7) % 3 == task].mean() for task in range(3))
    module.begin(batch)
    agree(task_loss(module, batch), expected, 1e-5)
    module.loss_mean = "row"
    assert (task_loss(module, batch) - expected).abs() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_an_expert_learns_from_its_own_rows_alone(kind):
    module, batch = moe(kind).train(), rows_for(kind)
    module.closed_groups = STAGE_ONE
    module.begin(with_tasks(batch, 2, 0, 0, 2, 0, 2))
    sum(module.step_losses(with_tasks(batch, 2, 0, 0, 2, 0, 2)).values()).backward()
    for core in parameter_groups(module)["adapters"]:
        grown = core.grad.flatten(1).abs().amax(1) > 0
        assert grown.tolist() == [True, False, True]
    if module.heads is not None:
        assert torch.equal(module.heads.linear.bias.grad != 0, module.heads.owner != 1)


# ---- 14: what reaches the router -------------------------------------------------------------------------------------


def router_gradients(module, loss):
    found = torch.autograd.grad(loss, list(module.router.parameters()), allow_unused=True, retain_graph=True)
    return [None if gradient is None else gradient.abs().max().item() for gradient in found]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("closed", [frozenset(), STAGE_TWO], ids=["side by side", "stage two"])
def test_14_the_task_loss_does_not_reach_the_router_but_its_own_loss_does(kind, closed):
    module, batch = moe(kind).train(), rows_for(kind)
    module.closed_groups = closed
    module.begin(batch)
    assert router_gradients(module, task_loss(module, batch)) == [None, None, None]
    losses = module.step_losses(batch)
    assert losses.keys() == ({"router_loss"} if closed else {"task_loss", "router_loss"})
    assert all(size > 0 for size in router_gradients(module, losses["router_loss"]))
    own = torch.autograd.grad(losses["router_loss"], parameter_groups(module)["adapters"], allow_unused=True)
    assert all(gradient is None for gradient in own)


def test_the_routers_loss_is_21_times_the_cross_entropy_with_the_rows_own_tasks():
    module, batch = moe(router=LinearRouter(noise=False)).train(), rows_for()
    scores = module.scores(batch)
    expected = -scores.log_softmax(-1)[torch.arange(6), batch["task_id"]].mean()
    for module.router_weight, factor in ((21.0, 21), (2.0, 2)):
        module.begin(batch)
        agree(module.method_loss_terms(batch)["router_loss"], factor * expected, 1e-5)
    assert not moe(trained=False).router_trained


def test_a_step_of_the_router_is_what_makes_it_trained():
    module, batch = moe(trained=False), rows_for()
    module.begin(batch)
    module.method_loss_terms(batch)
    assert not module.router_trained and not module.routes
    module.train().method_loss_terms(batch)
    assert module.router_trained and module.eval().routes


@pytest.mark.parametrize("kind", KINDS)
def test_14_straight_through_the_task_loss_reaches_the_router(kind):
    """By hand: dL/dz = p_e (δ - p) w', with w' the derivative of L by the size of the chosen expert's update."""
    module, batch = moe(kind, straight_through=True, router=LinearRouter(noise=False)).train(), rows_for(kind)
    module.closed_groups = STAGE_TWO
    module.begin(batch)
    scores, chosen = module._scores, module.context.get("task_id", 6)
    assert torch.equal(chosen, scores.argmax(-1)) and not torch.equal(chosen, batch["task_id"])
    loss = task_loss(module, batch)
    assert module.step_losses(batch).keys() == {"task_loss", "router_loss"}
    (found,) = torch.autograd.grad(loss, module.router.gate.weight, retain_graph=True)
    p, slopes = scores.detach().softmax(-1), []
    plain = moe(kind, router=LinearRouter(noise=False))
    for row, expert in enumerate(chosen.tolist()):
        send(plain, expert)
        own, ends = take(batch, row), []
        for step in (1e-3, -1e-3):
            for layer in plain.adapted.values():
                layer.scale = 1.0 + step
            ends.append(plain(own)[0] / own["task_share"])
        slopes.append((ends[0] - ends[1]).item() / 2e-3)
    taken = torch.nn.functional.one_hot(chosen, 3)
    by_score = torch.tensor(slopes).unsqueeze(1) * p.gather(1, chosen.unsqueeze(1)) * (taken - p)
    features = module.features.raw(batch)
    expected = by_score.T @ torch.nn.functional.layer_norm(features, features.shape[-1:])
    assert expected.abs().max() > 1e-3
    agree(found, expected, 1e-2 * expected.abs().max().item())


@pytest.mark.parametrize("kind", KINDS)
def test_straight_through_changes_no_output(kind):
    one = moe(kind, straight_through=True, router=LinearRouter(noise=False)).train()
    other, batch = moe(kind, router=LinearRouter(noise=False)), rows_for(kind)
    one.closed_groups = STAGE_TWO
    agree(output(one, batch), output(other, batch))


@pytest.mark.parametrize("routing", ["auto", "learned", "oracle"])
def test_a_validation_rates_what_its_stage_trains(routing):
    """Experts by their own tasks' rows, then the router by where it sends them."""
    module, batch = moe(routing=routing, trained=False), rows_for()
    for stage, expected in ((STAGE_ONE, batch["task_id"]), (STAGE_TWO, module.scores(batch).argmax(-1))):
        module.closed_groups = stage
        module.router_trained.fill_(stage == STAGE_TWO)
        module.begin(batch)
        assert torch.equal(module.context.get("task_id", 6), expected)
    assert not torch.equal(expected, batch["task_id"])


@pytest.mark.parametrize("closed", [frozenset(), STAGE_ONE], ids=["side by side", "stage one"])
def test_experts_learn_from_their_own_tasks_also_where_the_task_loss_shall_reach_the_router(closed):
    module, batch = moe(straight_through=True).train(), rows_for()
    module.closed_groups = closed
    module.begin(batch)
    assert torch.equal(module.context.get("task_id", 6), batch["task_id"])
    losses = module.step_losses(batch)
    assert losses.keys() == ({"task_loss"} if closed else {"task_loss", "router_loss"})
    assert router_gradients(module, losses["task_loss"]) == [None, None, None]
