"""Rows in which a TT-LoRA MoE's router has too little confidence: the bare base answers them, and only them."""

import pytest
import torch

from moe_peft.embedders import HiddenStates
from moe_peft.methods.evaluation import predict_rows
from moe_peft.methods.routing_report import router_accuracy, router_notes
from tests.methods.tiny_more import agree
from tests.methods.tiny_tt import KINDS, TASKS, moe, questions, rows_for, take
from tests.tiny import output


def refusing(kind, rows, **options):
    """A module that refuses the less sure half of a batch, the batch, and which rows these are."""
    module, batch = moe(kind, **options), rows_for(kind, rows)
    sure = module.router.confidence(module.scores(batch))
    module.null_below.fill_(sure.median())
    refused = sure < sure.median()
    assert 0 < refused.sum() < rows and len(sure.unique()) == rows
    return module, batch, refused


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grad", [True, False], ids=["folded anew", "kept folded"])
def test_a_refused_row_is_answered_by_the_bare_base_to_the_bit(kind, grad):
    module, batch, refused = refusing(kind, 8)
    with torch.set_grad_enabled(grad):
        found = output(module, batch)
        with module.context.disabled():
            bare = output(module, batch)
    assert torch.equal(found[refused], bare[refused])
    assert ((found - bare).abs().flatten(1).amax(1) > 1e-3).tolist() == (~refused).tolist()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mates", ["refused", "served", "none"])
def test_a_refused_row_is_the_bare_base_whatever_else_is_in_the_batch(kind, mates):
    module, batch, refused = refusing(kind, 8)
    row, *others = refused.nonzero().flatten().tolist()
    rows = {"refused": [row, *others], "served": [row, *(~refused).nonzero().flatten().tolist()], "none": [row]}[mates]
    batch = take(batch, *rows)
    with torch.no_grad(), module.context.disabled():
        bare = output(module, batch)
    with torch.no_grad():
        assert torch.equal(output(module, batch)[0], bare[0])


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_stay_do_not_see_that_others_are_refused(kind):
    module, batch, refused = refusing(kind, 8)
    with torch.no_grad():
        found = output(module, batch)
        module.null_below.fill_(torch.finfo(torch.float32).min)
        agree(found[~refused], output(module, batch)[~refused])


def test_no_row_is_refused_in_training_or_by_wish():
    module, batch, _ = refusing("causal", 8, straight_through=True)
    module.null_below.fill_(1e9)
    assert module.routed_tasks(batch).tolist() == [-1] * 8
    module.routing = "oracle"
    assert torch.equal(module.routed_tasks(batch), batch["task_id"])
    module.closed_groups = frozenset({"adapters", "heads"})
    assert module.train().routes and module.routed_tasks(batch).min() >= 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_prediction_says_how_sure_the_router_was_and_whether_the_row_was_refused(kind):
    module, batch = moe(kind), questions(kind, 1, 5)
    features = module.features.raw(batch)
    scores = torch.nn.functional.layer_norm(features, features.shape[-1:]) @ module.router.gate.weight.T
    per_row = len(scores) // 5
    sure = (scores.amax(1) - scores.mean(1))[::per_row]
    limit = sure.sort().values[2].item()
    module.null_below.fill_(limit)
    found = predict_rows(module, batch)
    assert [row.routing["confidence"] for row in found] == pytest.approx(sure.tolist(), abs=1e-5)
    refused = [row.routing["confidence"] < limit for row in found]
    assert [row.routing.get("as_task/none") == 1.0 for row in found] == refused and sum(refused) == 2
    with module.context.disabled():
        assert all(row.routing is None for row in predict_rows(module, batch)), "the bare base asks no router"
    module.routing = "oracle"
    assert all(row.routing is None for row in predict_rows(module, batch))


def test_a_row_that_no_head_answers_is_an_error():
    module, batch = moe("classifier"), questions("classifier", 2, 6)
    module.null_below.fill_(1e9)
    assert all(row.choice("sum") != row.label for row in predict_rows(module, batch))


def test_a_refused_row_is_not_found():
    module, batch = moe(features=HiddenStates(None, "mean")), questions("causal", 0, 4)
    module.scores = lambda batch: torch.tensor([[9.0, 0, 0], [1, 0, 0], [8, 0, 0], [0, 7, 0]])
    module.null_below.fill_(2.0)
    found = predict_rows(module, batch)
    assert router_accuracy(TASKS, found) == {"router/accuracy": 0.5, "router/task0": 0.5}
    assert router_notes(TASKS, found) == {"task0": "the router found 50.0% of its rows and refused 25.0%"}
    module.null_below.fill_(0.0)
    assert router_notes(TASKS, predict_rows(module, batch)) == {"task0": "the router found 75.0% of its rows"}
