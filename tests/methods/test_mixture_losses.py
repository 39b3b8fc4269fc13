"""Losses on routing: by hand for known routings, per router, without padding, the same on two ranks as on one."""

import threading

import pytest
import torch

from moe_peft.layers.mixtures import TokenRouter, dense, top_k
from moe_peft.methods import mixture_losses
from moe_peft.methods.hydra_lora import HydraLoRA
from moe_peft.methods.lora_moe import LoRAMoE
from moe_peft.methods.mixlora import MixLoRA
from moe_peft.methods.mixture_losses import Trace, load_balance, spread, z_loss
from moe_peft.methods.mola import MoLA
from tests.tiny import batch_of, build, random_batch, randomise

E = 4


def trace(scores, rule=dense, real=None):
    """What a router with these scores [B, S, E] leaves."""
    router = TokenRouter(1, E, "block", 1, rule)
    real = torch.ones(scores.shape[:2]) if real is None else real
    return Trace(scores, router.choose(scores).to(scores.dtype), real, real.sum())


def scores_of(seed=0, rows=3, tokens=5):
    return torch.randn(rows, tokens, E, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("rule", [dense, top_k(1), top_k(2), top_k(3), top_k(9)])
def test_even_probabilities_cost_one_whatever_k(rule):
    assert load_balance({"a": trace(torch.zeros(3, 5, E), rule)}).item() == pytest.approx(1.0)


@pytest.mark.parametrize("rule, cost", [(dense, E), (top_k(1), E), (top_k(2), E / 2)])
def test_one_expert_for_all_costs_their_number(rule, cost):
    scores = torch.zeros(3, 5, E)
    scores[..., 1] = 60.0
    if cost == E / 2:
        scores[..., 2] = 60.0
    assert load_balance({"a": trace(scores, rule)}).item() == pytest.approx(cost)


def test_load_balance_is_the_sum_of_shares_and_probabilities():
    scores, f, p = scores_of(), torch.zeros(E, dtype=torch.float64), torch.zeros(E, dtype=torch.float64)
    for row in scores.view(-1, E):
        f[row.topk(2).indices] += 1 / (15 * 2)
        p += row.softmax(0) / 15
    found = load_balance({"a": trace(scores, top_k(2))})
    assert found.item() == pytest.approx((E * f * p).sum().item(), abs=1e-12) and abs(found.item() - 1) > 1e-3


def test_two_routers_that_collapsed_onto_different_experts_are_not_balanced():
    one, other = torch.zeros(3, 5, E), torch.zeros(3, 5, E)
    one[..., 0] = other[..., 1] = 60.0
    assert load_balance({"a": trace(one, top_k(1)), "b": trace(other, top_k(1))}).item() == pytest.approx(E)


def test_z_loss_is_the_mean_squared_log_sum_exp():
    scores = scores_of()
    expected = sum(row.exp().sum().log() ** 2 for row in scores.view(-1, E)) / 15
    assert z_loss({"a": trace(scores)}).item() == pytest.approx(expected.item())


def test_the_spread_is_torchs_variance_over_the_squared_mean_and_free_of_scale():
    values = [scores_of(seed).abs() for seed in (0, 1)]
    expected = sum(own.var() / own.mean() ** 2 for own in values) / 2
    assert spread(values).item() == pytest.approx(expected.item(), rel=1e-8)
    assert spread([7 * own for own in values]).item() == pytest.approx(expected.item(), rel=1e-8)


def on_two_ranks(monkeypatch, function, shares):
    """Runs a function of a share on two pretended ranks, threads that add up at the same points."""
    barrier, given = threading.Barrier(2, timeout=20), [None, None]
    rank, results = threading.local(), [None, None]

    def all_reduce(own):
        given[rank.own] = own.clone()
        barrier.wait()
        own.copy_(given[0] + given[1])
        barrier.wait()

    def run(own):
        rank.own = own
        results[own] = function(shares[own])

    monkeypatch.setattr(mixture_losses, "ranks", lambda: 2)
    monkeypatch.setattr(mixture_losses.distributed, "all_reduce", all_reduce)
    threads = [threading.Thread(target=run, args=(own,)) for own in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    monkeypatch.undo()
    return results


CASES = [
    (MoLA, {"experts": E, "balance": 1.0}, "balance"),
    (MoLA, {"experts": E, "z_loss": 1.0}, "z_loss"),
    (HydraLoRA, {"experts": E, "balance": 1.0}, "balance"),
    (MixLoRA, {"experts": E, "balance": 1.0}, "balance"),
    (LoRAMoE, {"experts": E, "constraint": 1.0, "knowledge_tasks": ["tone"]}, "constraint"),
]


def made(own, arguments, kind="causal"):
    """A module in fp64 with random tensors."""
    module = build(own, kind, rank=2, **arguments)
    randomise(module, scale=0.2)
    module.double()
    if module.heads is not None:
        module.heads.float()
    return module


def term(module, name, batch):
    """A loss term, and its gradients by parameter."""
    module.begin(batch)
    value = module.step_losses(batch)[name]
    value.backward()
    trained = module.named_parameters()
    return value.item(), {key: p.grad for key, p in trained if p.grad is not None and p.grad.any()}


@pytest.mark.parametrize("own, arguments, name", CASES)
def test_two_ranks_have_the_loss_and_the_mean_gradient_of_one(monkeypatch, own, arguments, name):
    prompts = [[5, 6, 7, 8, 9, 10], [11, 12], [13, 14, 15, 16, 17], [18, 19, 20]]
    answers = [[21, 22], [23], [24, 25, 26], [27]]
    whole = batch_of(prompts, answers)
    shares = [batch_of(prompts[:1], answers[:1]), batch_of(prompts[1:], answers[1:])]
    for share, rows in zip(shares, (slice(0, 1), slice(1, 4)), strict=True):
        share["task_id"] = whole["task_id"][rows]
    value, gradients = term(made(own, arguments), name, whole)
    pairs = [(made(own, arguments), name, share) for share in shares]
    (one, ours), (other, theirs) = on_two_ranks(monkeypatch, lambda pair: term(*pair), pairs)
    assert (one + other) / 2 == pytest.approx(value, rel=1e-9)
    assert gradients and set(gradients) == set(ours) == set(theirs)
    for key, gradient in gradients.items():
        torch.testing.assert_close((ours[key] + theirs[key]) / 2, gradient, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("own, arguments, name", CASES)
@pytest.mark.parametrize("kind", ["causal", "seq2seq", "classifier"])
def test_padding_does_not_count(own, arguments, name, kind):
    prompts, answers = [[5, 6, 7, 8], [9, 10]], [[12, 13, 14], [15]]
    side = "left" if kind == "causal" else "right"
    batches = [batch_of(prompts, answers, kind, side, extra) for extra in (0, 4)]
    if kind == "seq2seq":  # the decoder's input is as long as the labels
        batches[1]["labels"] = torch.nn.functional.pad(batches[1]["labels"], (0, 3), value=-100)
    found = [term(made(own, arguments, kind), name, batch)[0] for batch in batches]
    assert found[0] == pytest.approx(found[1], rel=1e-9)


def test_recomputation_changes_neither_terms_nor_gradients():
    batch = random_batch()
    for own, arguments, name in CASES:
        found = []
        for recomputed in (False, True):
            module = build(own, rank=2, **arguments)
            randomise(module, scale=0.2)
            if recomputed:
                options = {"use_reentrant": False, "context_fn": module.context.checkpoint_fns}
                module.model.gradient_checkpointing_enable(options)
                for block in module.model.model.layers:
                    block.training = True
            module.begin(batch)
            terms = module.step_losses(batch)
            sum(terms.values()).backward()
            found.append([terms[name], *(p.grad for p in module.parameters() if p.grad is not None)])
        torch.testing.assert_close(found[0], found[1])


def test_models_without_rows_in_their_linears_have_the_same_losses():
    """OPT hands its FFNs tokens alone."""
    module = build(MoLA, rank=2, balance=1.0)
    randomise(module, scale=0.2)
    batch = random_batch()
    values = []
    for flat in (False, True):
        module.begin(batch)
        module.row_losses(batch)
        if flat:
            terms = module.context._terms["scores"]
            module.context._terms["scores"] = {slot: scores.flatten(0, 1) for slot, scores in terms.items()}
        values.append(module.method_loss_terms(batch)["balance"].item())
    assert values[0] == values[1]


def test_evaluation_leaves_no_scores():
    module = build(MoLA, balance=1.0).eval()
    batch = random_batch()
    module.begin(batch)
    assert set(module.step_losses(batch)) == {"task_loss"}
