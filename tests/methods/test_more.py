"""What a faithful MoRE shows (arXiv 2505.22694 and its official code): the update, its gradients, shapes and errors.

Merging, exports, checkpoints and runs have files of their own. Shapes: B batch, r ranks, N experts, T tasks.
"""

from copy import deepcopy

import peft
import pytest
import torch
from torch import nn

from moe_peft.counting import count_parameters
from moe_peft.data.tasks import TaskSpec
from moe_peft.methods.lora import LoRA
from moe_peft.methods.more import MoRE, expert_ranks
from tests.tiny import TASKS, bare_logits, batch_of, build, come_alive, output, random_batch, randomise, tiny_backbone

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


# ---- 1-3: plain LoRA of the first k ranks ----------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scaling", SCALINGS)
def test_01_a_forced_rank_is_the_base_plus_the_first_k_ranks(kind, scaling):
    """Oracle: the bare model with W + s c_k sum_{j <= k} s_j b_j a_j in every linear's place."""
    with torch.enable_grad():
        module, batch = more(kind, alpha=3.0, scaling=scaling)
    for k in range(1, R + 1):
        rank_of(module, [k, k])
        torch.manual_seed(0)
        plain = tiny_backbone(kind).load().double()
        for slot, layer in module.adapted.items():
            c = {"rank_over_r": k / R, "paper": k / len(TASKS), "none": 1, "code": 1}[scaling]
            for j in range(k):
                s = ((j + 1) / R) ** 2 if scaling == "code" else 1
                term = torch.outer(layer.factors.B[:, j], layer.factors.A[j])
                plain.get_submodule(slot).weight += 3.0 / R * c * s * term
        expected, found = answer(plain, batch), output(module, batch)
        agree(found, expected)
        with module.context.disabled():
            assert (found - output(module, batch)).abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", range(1, R + 1))
def test_01_a_forced_rank_is_hf_pefts_lora_of_that_rank(kind, k):
    module, batch = more(kind, alpha=3.0, scaling="none")
    rank_of(module, [k, k])
    torch.manual_seed(0)
    config = peft.LoraConfig(r=k, lora_alpha=3.0 * k / R, target_modules=list(module.adapted), lora_dropout=0.0)
    theirs = peft.get_peft_model(tiny_backbone(kind).load(), config).eval().get_base_model().double()
    for slot, layer in module.adapted.items():
        other = theirs.get_submodule(slot)
        other.lora_A.default.weight.data.copy_(layer.factors.A[:k])
        other.lora_B.default.weight.data.copy_(layer.factors.B[:, :k])
    given, expected = output(module, batch), answer(theirs, batch)
    agree(given, expected)
    upstream = torch.linspace(-1, 1, given.numel(), dtype=given.dtype).view_as(given)
    given.backward(upstream), expected.backward(upstream)
    for slot, layer in module.adapted.items():
        other = theirs.get_submodule(slot)
        a, b = layer.factors.A.grad, layer.factors.B.grad
        agree(a[:k], other.lora_A.default.weight.grad)
        agree(b[:, :k], other.lora_B.default.weight.grad)
        assert a[:k].any() and b[:, :k].any() and not a[k:].any() and not b[:, k:].any()


@pytest.mark.parametrize("kind", KINDS)
def test_01_the_full_rank_is_ordinary_lora(kind):
    module = build(MoRE, kind, rank=R, scaling="none", selector="fixed").double()
    randomise(module)
    batch = batch_for(module, kind)
    lora = build(LoRA, kind, rank=R, alpha=module.alpha).double()
    for slot, layer in lora.adapted.items():
        layer.factors.load_state_dict(module.adapted[slot].factors.state_dict())
    found = output(module, batch)
    agree(found, output(lora, batch), 1e-12)
    with module.context.disabled():
        assert (found - output(module, batch)).abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("selector", ["full", "winner"])
def test_02_a_batch_leaves_the_ranks_above_its_tasks_without_gradient(kind, selector):
    module, batch = more(kind, selector=selector)
    tables = module.rank_table()
    assert len({rank for ranks in tables.values() for rank in ranks}) > 2
    for task in (0, 1):
        module.zero_grad(set_to_none=True)
        module(of_task(batch, task)).sum().backward()
        for slot, layer in module.adapted.items():
            k = tables[slot][task]
            assert not layer.factors.A.grad[k:].any() and not layer.factors.B.grad[:, k:].any()
            assert (layer.factors.A.grad[:k].abs().amax(1) > 0).all()
            assert (layer.factors.B.grad[:, :k].abs().amax(0) > 0).all()


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("selector", ["full", "winner", "random"])
def test_03_the_update_is_zero_at_the_start_to_the_bit_for_every_task_and_rank(kind, selector):
    module = build(MoRE, kind, rank=R, selector=selector)
    batch = batch_for(module, kind)
    with module.context.disabled():
        bare = output(module, batch)
    assert torch.equal(output(module, batch), bare)
    for task in (0, 1):
        for k in range(1, R + 1):
            rank_of(module, [k, k])
            assert torch.equal(output(module, of_task(batch, task)), bare)
    for layer in module.adapted.values():
        nn.init.normal_(layer.factors.B)
    assert (output(module, batch) - bare).abs().max() > 1e-3


# ---- 5: who gets a gradient ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("selector", ["full", "winner"])
def test_05_the_selector_has_a_gradient_as_soon_as_b_is_not_zero(kind, selector, scaling):
    """In the encoder and in the decoder, self- and cross-attention alike: come_alive looks at every tensor."""
    module = build(MoRE, kind, rank=R, selector=selector, scaling=scaling)
    batch = batch_for(module, kind)
    module(batch).sum().backward()
    own = [name for name, p in module.named_parameters() if ".router." in name and p.requires_grad]
    assert len(own) == 3 * len(module.adapted)
    assert not any(module.get_parameter(name).grad.any() for name in own)
    assert all(layer.factors.B.grad.any() for layer in module.adapted.values())
    module.zero_grad(set_to_none=True)
    come_alive(module, batch)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("selector", ["full", "winner"])
def test_05_the_task_loss_reaches_the_embeddings_of_the_batchs_tasks_alone(kind, selector):
    module = build(MoRE, kind, rank=R, selector=selector, tasks=tasks_of(5))
    batch = batch_for(module, kind, rows=5)
    come_alive(module, batch)
    batch["task_id"] = torch.tensor([1, 3, 3, 1, 3])
    module(batch).sum().backward()
    for slot, layer in module.adapted.items():
        reached = layer.router.embedding.weight.grad.abs().amax(1) > 0
        assert reached.tolist() == [False, True, False, True, False], slot


def test_05_the_shared_table_likewise():
    module = build(MoRE, rank=R, embedding_dim=6, tasks=tasks_of(3))
    batch = batch_for(module, rows=4)
    come_alive(module, batch)
    module(of_task(batch, 2)).sum().backward()
    assert (module.task_embedding.weight.grad.abs().amax(1) > 0).tolist() == [False, False, True]


@pytest.mark.parametrize("selector", ["random", "fixed"])
def test_05_a_table_that_is_not_learned_has_no_gate_and_its_embeddings_stay(selector):
    """Their gradient is there and zero, so that data-parallel processes agree on who takes part."""
    module = build(MoRE, rank=R, selector=selector)
    randomise(module)
    module(batch_for(module)).sum().backward()
    trained = {name.rsplit(".", 2)[-2] for name, p in module.named_parameters() if p.requires_grad}
    assert trained == {"factors", "embedding"}
    assert all(not s.embedding.weight.grad.any() for s in module.selectors().values())


# ---- 14: mixed batches -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"selector": "winner", "scaling": "code"}, {"embedding_dim": 6}], ids=str)
def test_14_a_mixed_batch_is_its_tasks_batches(kind, options):
    """Outputs row by row, and the gradients in their sum."""
    module, batch = more(kind, tasks=tasks_of(3), **options)
    tolerance = 1e-5 if module.heads is not None else 1e-9  # heads are fp32
    mixed, losses = output(module, batch), module(batch)
    losses.sum().backward()
    gradients = {name: p.grad for name, p in module.named_parameters() if p.requires_grad}
    module.zero_grad(set_to_none=True)
    others = []
    for task in range(3):
        rows = (batch["task_id"] == task).nonzero().flatten().tolist()
        one = {name: value[rows] if torch.is_tensor(value) else value for name, value in batch.items()}
        agree(output(module, one), mixed[rows])
        alone = module(one)
        agree(alone, losses[rows], tolerance)
        alone.sum().backward()
        others.append(output(module, of_task(batch, (task + 1) % 3))[rows] - mixed[rows])
    assert all(other.abs().max() > 1e-3 for other in others), "the tasks do not differ"
    for name, gradient in gradients.items():
        assert gradient.abs().max() > 0, name
        agree(module.get_parameter(name).grad, gradient, tolerance * max(1.0, gradient.abs().max().item()))


PROMPTS, ANSWERS = [[5, 6, 7, 8], [9, 10, 11, 12, 13, 14, 15], [20, 21]], [[30, 31], [32], [33, 34, 35]]


def test_14_a_row_depends_on_neither_batch_mates_nor_padding():
    module, _ = more()

    def rows(*which, **options):
        batch = batch_of([PROMPTS[i] for i in which], [ANSWERS[i] for i in which], **options)
        batch["task_id"] = torch.tensor([i % 2 for i in which])
        return module(batch)

    together = rows(0, 1, 2)
    agree(rows(0, 1, 2, extra=3), together, 1e-6)
    agree(rows(2, 0, 1), together[[2, 0, 1]], 1e-6)
    for i in range(3):
        agree(rows(i), together[[i]], 1e-6)


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
