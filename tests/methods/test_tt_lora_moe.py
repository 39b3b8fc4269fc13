"""TT-LoRA MoE answering rows: one expert per row in every layer, chosen by features of the bare base alone.

Numbers in test names are those of the method's list of properties.
"""

from functools import partial

import pytest
import torch

from moe_peft.embedders import HiddenStates
from moe_peft.layers.expert_router import LinearRouter
from moe_peft.layers.tensor_train import reconstruct
from moe_peft.methods.evaluation import predict_rows
from moe_peft.metrics import score_row
from tests.methods.tiny_more import agree
from tests.methods.tiny_tt import KINDS, TASKS, alone, blank, moe, questions, rows_for, send, take, with_tasks
from tests.tiny import batch_of, output, random_batch, randomise

CHOSEN = [2, 0, 0, 1, 2, 1]
"""Another expert than the own one for all rows but the last two."""

UNKEPT = partial(HiddenStates, None, "auto", keep=False)
"""Features that are computed anew for every batch."""


def chosen_by(module, batch):
    """The expert of every row, by the router's own numbers."""
    features = module.features.raw(batch)
    normal = torch.nn.functional.layer_norm(features, features.shape[-1:])
    return (normal @ module.router.gate.weight.T).argmax(-1)


# ---- 12, 13: one expert per row --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_12_the_router_picks_one_expert_per_row_for_all_layers(kind):
    module, batch = moe(kind, rank=2), rows_for(kind, 12)
    mean = module.features.raw(batch).mean(0)
    module.router.gate.weight.data -= torch.outer(module.router.gate.weight.data @ mean, mean) / mean.square().sum()
    expected = chosen_by(module, batch)
    assert len(set(expected.tolist())) > 1 and not torch.equal(expected, batch["task_id"])
    seen = {}
    for layer in module.adapted.values():
        layer.register_forward_hook(lambda layer, args, y: seen.update({layer.slot: (args[0], y.clone())}))
    output(module, batch)
    assert seen.keys() == module.adapted.keys()
    for slot, (x, y) in seen.items():
        layer = module.adapted[slot]
        for row, expert in enumerate(expected.tolist()):
            dense = reconstruct([core[expert] for core in layer.factors.cores], layer.factors.layout)
            agree(y[row], layer.base(x[row]) + module.alpha * x[row] @ dense.T)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grad", [True, False], ids=["folded anew", "kept folded"])
def test_13_a_row_is_answered_as_by_its_expert_alone(kind, grad):
    module, batch = moe(kind), rows_for(kind)
    send(module, *CHOSEN)
    singles = [alone(module, expert) for expert in range(3)]
    with torch.set_grad_enabled(grad):
        found = output(module, batch)
        for row, expert in enumerate(CHOSEN):
            own = with_tasks(take(batch, row), 0)
            agree(found[row : row + 1], output(singles[expert], own))
            assert (found[row : row + 1] - output(singles[expert - 1], own)).abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [(3,), (5, 4, 3, 2, 1, 0), (2, 0, 2)], ids=["alone", "turned", "other mates"])
def test_13_a_row_does_not_see_its_batch(kind, rows):
    module, batch = moe(kind), rows_for(kind)
    found = output(module, batch)
    agree(output(module, take(batch, *rows)), found[list(rows)])


@pytest.mark.parametrize("kind", KINDS)
def test_before_the_router_was_trained_and_by_wish_rows_go_to_their_own_experts(kind):
    batch = rows_for(kind)
    untrained, oracle = moe(kind, trained=False), moe(kind, routing="oracle")
    found = output(untrained, batch)
    assert torch.equal(found, output(oracle, batch))
    for row in range(6):
        agree(found[row : row + 1], output(alone(untrained, row % 3), with_tasks(take(batch, row), 0)))


# ---- 15: noise -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_15_answers_do_not_depend_on_chance(kind):
    module, batch = moe(kind), rows_for(kind)
    found = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        found.append((module.scores(batch), output(module, batch)))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    module.train()
    assert not torch.equal(module.scores(batch), found[0][0])


# ---- 16: features of the bare base -----------------------------------------------------------------------------------


PROMPTS, ANSWERS = [[5, 6, 7], [8, 9, 10, 11, 12], [13, 14]], [[20], [21, 22], [23, 24, 25]]


@pytest.mark.parametrize("kind", KINDS)
def test_16_scores_see_neither_padding_nor_answer(kind):
    module = moe(kind, features=UNKEPT())
    expected = module.scores(batch_of(PROMPTS, ANSWERS, kind))
    for side, extra, answers in (("left", 3, ANSWERS), ("right", 0, ANSWERS), ("right", 4, [[30, 31], [32], [33]])):
        agree(module.scores(batch_of(PROMPTS, answers, kind, side, extra)), expected, 1e-6)
    others = module.scores(batch_of([prompt[::-1] for prompt in PROMPTS], ANSWERS, kind))
    assert (others - expected).abs().max() > 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_16_scores_do_not_see_adapters_tasks_or_mode(kind):
    module, batch = moe(kind, features=UNKEPT(), router=LinearRouter(noise=False)), rows_for(kind)
    expected, gate = module.scores(batch), module.router.gate.weight.clone()
    randomise(module, seed=7, scale=1.0)
    module.router.gate.weight.data.copy_(gate)
    assert torch.equal(module.scores(with_tasks(batch, 2, 2, 1, 0, 1, 1)), expected)
    assert torch.equal(module.train().scores(batch), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_16_scores_do_not_see_the_precision_of_training(kind):
    module, batch = blank(kind, features=UNKEPT(), router=LinearRouter(noise=False)), rows_for(kind)
    expected = module.scores(batch)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(module.scores(batch), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_16_kept_features_give_the_same_scores(kind):
    plain, kept = (moe(kind, features=HiddenStates(None, "auto", keep=keep)) for keep in (False, True))
    for rows in ((0, 1, 2), (4, 1), (0, 5, 3, 2), (0, 1, 2, 3, 4, 5)):
        batch = take(rows_for(kind), *rows)
        assert torch.equal(kept.scores(batch), plain.scores(batch))


def test_the_default_features_are_the_last_token_of_a_causal_model_and_the_mean_otherwise():
    for kind in KINDS:
        module, batch = moe(kind), random_batch(kind=kind)
        expected = HiddenStates(None, "last" if kind == "causal" else "mean")
        expected.bind(module.backbone, module.model, module.context)
        assert module.features.keep
        agree(module.features.raw(batch), expected.raw(batch), 1e-6)


# ---- 18, 20: answers of right and wrong experts ----------------------------------------------------------------------


def accuracies(module, kind, specs=TASKS):
    rows = [row for task in range(3) for row in predict_rows(module, questions(kind, task, 24))]
    return score_row(specs, rows, "sum").tasks


@pytest.mark.parametrize("kind", KINDS)
def test_20_with_an_oracle_every_task_scores_as_its_expert_alone(kind):
    module = moe(kind, routing="oracle")
    found = accuracies(module, kind)
    for task in range(3):
        own = questions(kind, task, 24)
        there, here = (predict_rows(method, batch) for method, batch in (
            (alone(module, task), own | {"task_id": torch.zeros_like(own["task_id"])}), (module, own)
        ))  # fmt: skip
        for one, other in zip(here, there, strict=True):
            assert one.scores == pytest.approx(other.scores, abs=1e-6)
        single = score_row([TASKS[task]], there, "sum").tasks[f"task{task}"].value
        assert found[f"task{task}"].value == single and 0 < single < 1


def test_18_a_wrong_experts_answer_is_an_error_unless_it_names_the_class():
    module, batch = moe("classifier"), questions("classifier", 0)
    send(module, *[2] * 12)
    single = alone(module, 2)
    answered = predict_rows(single, batch | {"task_id": torch.zeros_like(batch["task_id"])})
    names = [TASKS[2].choices[row.choice("sum")] for row in answered]
    found = predict_rows(module, batch)
    right = [TASKS[0].choices[row.label] for row in found]
    hits = [row.choice("sum") == row.label for row in found]
    assert hits == [name == label for name, label in zip(names, right, strict=True)]
    assert any(hits) and not all(hits) and {"good", "bad"} & set(names) and {"neutral", "mixed"} & set(names)


@pytest.mark.parametrize("kind", KINDS)
def test_18_answers_and_losses_are_finite_whatever_expert_serves_a_row(kind):
    module = moe(kind)
    for task in range(3):
        for expert in range(3):
            batch = questions(kind, task, 5)
            send(module, *[expert] * len(batch["row_id"]))
            for row in predict_rows(module, batch):
                assert len(row.scores) == len(TASKS[task].choices)
                assert torch.tensor(row.scores).isfinite().all()
                sure = {"confidence": pytest.approx(2 / 3)}
                assert row.routing == (sure if expert == task else sure | {f"as_task/task{expert}": 1.0})
    send(module, *CHOSEN)
    assert module(rows_for(kind)).isfinite().all()
