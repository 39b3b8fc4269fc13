"""MoRE's options: every shape of experts and embeddings, the rank cost, diagnostics, errors."""

from copy import deepcopy

import pytest
import torch

from moe_peft.counting import count_parameters
from moe_peft.layers.nested_experts import expert_ranks
from moe_peft.methods.more import MoRE
from tests.methods.tiny_more import KINDS, R, batch_for, more, tasks_of
from tests.tiny import bare_logits, build, come_alive, output, random_batch, randomise

# ---- 17: every shape -------------------------------------------------------------------------------------------------

SHAPES = {
    "T > r": ({"rank": 2, "tasks": tasks_of(5)}, [1, 2]),
    "r > 8": ({"rank": 12}, list(range(1, 13))),
    "one rank": ({"rank": 1}, [1]),
    "N < r": ({"rank": 6, "experts": 3}, [2, 4, 6]),
    "N that does not divide r": ({"rank": 7, "experts": 3}, [3, 5, 7]),
    "a list": ({"rank": 8, "experts": [1, 3, 8]}, [1, 3, 8]),
    "some linears": ({}, [1, 2, 3, 4]),
    "one task": ({"tasks": tasks_of(1)}, [1, 2, 3, 4]),
}


SOME = {"causal": ["v_proj"], "seq2seq": ["wi", "EncDecAttention.k"], "classifier": ["query"]}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_17_any_number_of_ranks_tasks_experts_and_linears(kind, shape):
    options, ranks = SHAPES[shape]
    some = {"targets": SOME[kind]} if shape == "some linears" else {}
    module = build(MoRE, kind, **{"rank": R} | options | some)
    assert module.expert_ranks == ranks
    batch, tasks = batch_for(module, kind), len(module.specs)
    if ranks == [1]:
        randomise(module)  # nothing to choose: its gate has no gradient
    else:
        come_alive(module, batch)
    table = module.rank_table()
    assert set(table) == set(module.adapted) and all(len(row) == tasks for row in table.values())
    assert {rank for row in table.values() for rank in row} <= set(ranks)
    losses = module(batch)
    with module.context.disabled():
        assert (losses - module(batch)).abs().max() > 1e-3
    if some:
        assert {slot.rsplit(".", 1)[-1] for slot in table} == {name.rsplit(".", 1)[-1] for name in SOME[kind]}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("experts", [None, 2])
def test_11_the_trainable_count_is_the_formula(kind, experts):
    """Per linear r (D + O), N D + N and T D; the published figures are in tests/test_counting.py."""
    module = build(MoRE, kind, rank=R, experts=experts, tasks=tasks_of(3))
    n, layers, counts = experts or R, list(module.adapted.values()), count_parameters(module)
    assert counts["factors"] == sum(R * (layer.in_features + layer.out_features) for layer in layers)
    assert counts["router"] == sum(n * layer.in_features + n for layer in layers)
    assert counts["embeddings"] == sum(3 * layer.in_features for layer in layers)
    assert counts["trainable"] == counts["factors"] + counts["router"] + counts["embeddings"] + counts["heads"]
    assert counts["per_task"] == counts["trainable"] // 3


@pytest.mark.parametrize("kind", KINDS)
def test_11_one_shared_table_counts_once(kind):
    module = build(MoRE, kind, rank=R, embedding_dim=6, tasks=tasks_of(3))
    counts = count_parameters(module)
    assert counts["embeddings"] == 3 * 6
    assert counts["router"] == len(module.adapted) * (R * 6 + R)
    assert sum(name == "task_embedding.weight" for name in module.adapter_state()) == 1
    saved = {name.split(".router.")[1] for name in module.adapter_state() if ".router." in name}
    assert saved == {"weight", "bias", "experts", "start"}


def test_fixed_ranks_are_one_for_all_or_one_per_task():
    def table(given):
        module = build(MoRE, rank=R, selector="fixed", fixed_rank=given)
        return set(map(tuple, module.rank_table().values()))

    assert (table(None), table(2), table([3, 1])) == ({(4, 4)}, {(2, 2)}, {(3, 1)})


def test_experts_in_even_steps():
    assert [expert_ranks(8, n) for n in (1, 2, 4, 8)] == [[8], [4, 8], [2, 4, 6, 8], list(range(1, 9))]
    assert all(len(set(expert_ranks(13, n))) == n and expert_ranks(13, n)[-1] == 13 for n in range(1, 14))


# ---- the rank cost, the diagnostics ----------------------------------------------------------------------------------


def test_the_rank_cost_is_the_mean_expected_rank():
    module, batch = more(rank_cost=0.25, experts=[1, 4])
    module.train()
    module.begin(batch)
    module.row_losses(batch)
    expected = 0.0
    for selector in module.selectors().values():
        z = selector.embedding.weight @ selector.weight.mT + selector.bias
        for row in z.exp().tolist():
            expected += (1 * row[0] + 4 * row[1]) / sum(row)
    expected /= len(module.adapted) * len(module.specs)
    terms = module.method_loss_terms(batch)
    assert list(terms) == ["rank_cost"]
    assert terms["rank_cost"].item() == pytest.approx(0.25 * expected, rel=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_the_rank_cost_lowers_the_ranks_to_one(kind):
    module = build(MoRE, kind, rank=R, rank_cost=1.0).train()
    randomise(module, scale=0.1)
    batch = batch_for(module, kind)
    before = module.diagnostics()["ranks/mean"]
    optimizer = torch.optim.Adam([p for s in module.selectors().values() for p in s.parameters()], lr=0.05)
    for _ in range(60):
        optimizer.zero_grad()
        module.begin(batch)
        module.row_losses(batch)
        module.method_loss_terms(batch)["rank_cost"].backward()
        optimizer.step()
    assert before > 2 and module.diagnostics()["ranks/mean"] == 1.0


def test_without_a_cost_there_is_no_term():
    module, batch = more()
    module.train()
    module.begin(batch)
    module.row_losses(batch)
    assert module.method_loss_terms(batch) == {}


def test_20_the_diagnostics_are_those_of_a_table_made_by_hand():
    module = build(MoRE, rank=8, targets=["v_proj"], tasks=tasks_of(3))
    gates = [[3.0, 0.0, 0.0], [0.0, 9.0, 9.0]]
    for selector, experts, height in zip(module.selectors().values(), ([1, 2, 7], [4, 4, 0]), gates, strict=True):
        selector.embedding.weight.data.zero_()
        selector.weight.data.zero_()
        selector.bias.data.zero_()
        selector.embedding.weight.data[:, :3] = torch.eye(3)
        selector.start.copy_(torch.tensor([0, 4, 0]))
        for task, expert in enumerate(experts):
            selector.weight.data[expert, task] = height[task] or 0.001
    assert list(module.rank_table().values()) == [[2, 3, 8], [5, 5, 1]]
    assert list(module.rank_table(start=True).values()) == [[1, 5, 1], [1, 5, 1]]
    found = module.diagnostics()
    assert [found[f"rank/task{i}"] for i in range(3)] == [3.5, 4.0, 4.5]
    assert found["ranks/mean"] == 4.0
    assert found["ranks/changed"] == 4 / 6
    assert found["ranks/distinct"] == (3 + 2) / 2
    entropies = []
    for height in (3.0, 0.001, 0.001, 0.001, 9.0, 9.0):
        p = [torch.tensor(x).exp().item() / (torch.tensor(height).exp().item() + 7) for x in [height] + [0.0] * 7]
        entropies.append(-sum(x * torch.tensor(x).log().item() for x in p))
    assert found["ranks/entropy"] == pytest.approx(sum(entropies) / 6, rel=1e-5)


def test_20_a_fixed_table_has_no_entropy():
    found = build(MoRE, rank=R, selector="fixed").diagnostics()
    assert found["ranks/entropy"] == 0 and found["ranks/changed"] == 0 and found["ranks/mean"] == R


# ---- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 4, "experts": 5}, "^experts: 5 nested experts do not fit rank 4; use 1 to 4, or raise rank$"),
        ({"rank": 4, "experts": 0}, "^experts: 0 nested experts"),
        ({"rank": 0}, "^rank: 0 is below 1"),
        ({"experts": [1, 4]}, r"^experts: \[1, 4\] must increase from 1 or more to rank, 8; correct the list$"),
        ({"experts": [4, 1, 8]}, "must increase"),
        ({"experts": [1, 1, 8]}, "must increase"),
        ({"experts": [0, 8]}, "must increase"),
        ({"experts": []}, "must increase"),
        ({"fixed_rank": 3}, "^fixed_rank: 3 is given but selector is 'full'; set selector: fixed$"),
        (
            {"selector": "fixed", "fixed_rank": 9},
            "^fixed_rank: 9 is no expert's rank; use one of 1, 2, 3, 4, 5, 6, 7, 8$",
        ),
        (
            {"selector": "fixed", "fixed_rank": 3, "experts": [1, 8]},
            "^fixed_rank: 3 is no expert's rank; use one of 1, 8$",
        ),
        (
            {"selector": "fixed", "fixed_rank": [1, 2, 3]},
            r"^fixed_rank: \[1, 2, 3\] names 3 ranks for 2 tasks; give one",
        ),
        ({"rank_cost": -0.1}, "^rank_cost: -0.1 is negative, which would reward large ranks; give 0 or more$"),
        ({"embedding_dim": 0}, "^embedding_dim: 0 is below 1"),
    ],
    ids=str,
)
def test_wrong_arguments_are_one_line(options, message):
    with pytest.raises(ValueError, match=message) as error:
        build(MoRE, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("wrong", [2, -1])
def test_a_task_id_out_of_range_is_refused(wrong):
    module, batch = more()
    batch["task_id"][1] = wrong
    with pytest.raises(ValueError, match=rf"task_id: {wrong} "):
        module(batch)
    with module.context.disabled():
        module(batch)  # the bare base knows no tasks


def test_a_batch_without_task_ids_is_refused():
    module, batch = more()
    del batch["task_id"]
    with pytest.raises(ValueError, match="the batch has no task_id; give every row the index of its task"):
        module(batch)
    assert torch.isfinite(bare_logits(module, batch)).all()


def test_a_module_can_be_copied_after_a_training_step():
    module, batch = build(MoRE, rank=4, rank_cost=0.1), random_batch()
    module.train()
    (module(batch).sum() + module.method_loss_terms(batch)["rank_cost"]).backward()
    copy = deepcopy(module)
    assert copy.rank_table() == module.rank_table()


def test_a_prediction_names_the_chosen_expert_alone():
    module, batch = build(MoRE, rank=4, experts=[2, 4]), random_batch()
    randomise(module)
    module.context.recording = True
    output(module.eval(), batch)
    for slot, ranks in module.rank_table().items():
        weights = module.context.records[slot].weights.squeeze(1)
        expected = [[float(ranks[task] == rank) for rank in (2, 4)] for task in batch["task_id"].tolist()]
        assert weights.tolist() == expected
