"""SMoRA's bias: moved once per optimizer step by what all ranks' real tokens chose, and by nothing else."""

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

from moe_peft.methods import mixture_losses
from moe_peft.methods.smora import SMoRA
from tests.tiny import batch_of, build, random_batch, randomise, tiny_backbone

E, K, STEP = 6, 2, 1e-5
SLOT = "model.layers.1.mlp.up_proj"


def smora(**options):
    module = build(SMoRA, **{"experts": E, "rank": 1, "top_k": K, "bias_step": STEP} | options)
    randomise(module, scale=0.2)
    return module


def loads(module, batch):
    """How many real tokens chose each expert, by linear."""
    training = module.training
    module.eval().context.recording = True
    with torch.no_grad():
        module(batch)
    real = batch["attention_mask"].unsqueeze(-1)
    found = {slot: ((one.weights > 0) * real).sum((0, 1)) for slot, one in module.context.records.items()}
    module.train(training).context.recording = False
    return found


def biases(module):
    return {slot: layer.router.bias.clone() for slot, layer in module.adapted.items()}


def moved(totals, steps=1):
    return {slot: steps * STEP * (own.double().mean() - own).sign().float() for slot, own in totals.items()}


def micro_batch(module, batch):
    module.begin(batch)
    module.step_losses(batch)


def test_a_fit_moves_each_bias_once_a_step_by_the_counts_of_its_micro_batches(tmp_path):
    module = smora(backbone=tiny_backbone(gradient_checkpointing=True), optimizer=lambda p: torch.optim.SGD(p, lr=0.0))
    batches = [random_batch(3, seed=seed) for seed in (3, 4)]
    one, other = (loads(module, batch) for batch in batches)
    trainer = pl.Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        max_epochs=2,
        accumulate_grad_batches=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(batches, batch_size=None))
    assert trainer.global_step == 2
    expected = moved({slot: own + other[slot] for slot, own in one.items()}, steps=2)
    torch.testing.assert_close(biases(module), expected, rtol=0, atol=1e-9)
    assert all(own.any() for own in expected.values())
    assert any(not torch.equal(own, expected[slot]) for slot, own in moved(one, steps=2).items())


def test_every_real_token_counts_k_times_whatever_is_recomputed():
    module = smora(backbone=tiny_backbone(gradient_checkpointing=True))
    batch = batch_of([[5, 6, 7, 8], [9, 10]], [[12, 13], [14]], extra=3)
    module.begin(batch)
    sum(module.step_losses(batch).values()).backward()
    assert {slot: int(own.sum()) for slot, own in module._loads.items()} == dict.fromkeys(module.adapted, 9 * K)
    torch.testing.assert_close(module._loads, loads(module, batch))


def test_evaluation_moves_nothing():
    module, batch = smora().eval(), random_batch()
    micro_batch(module, batch)
    module.on_before_optimizer_step(None)
    assert not any(own.any() for own in biases(module).values())


def test_the_counts_of_all_ranks_decide(monkeypatch):
    module, batch = smora(), random_batch()
    own = loads(module, batch)
    theirs = {slot: 3 * count.flip(0) for slot, count in own.items()}
    micro_batch(module, batch)
    monkeypatch.setattr(mixture_losses, "ranks", lambda: 2)
    monkeypatch.setattr(mixture_losses.distributed, "all_reduce", lambda sums: sums.add_(torch.cat([*theirs.values()])))
    module.on_before_optimizer_step(None)
    expected = moved({slot: count + theirs[slot] for slot, count in own.items()})
    torch.testing.assert_close(biases(module), expected, rtol=0, atol=0)
    assert any(not torch.equal(move, expected[slot]) for slot, move in moved(own).items())


def test_a_step_counts_what_came_since_the_one_before():
    module, batch = smora(), random_batch()
    micro_batch(module, batch)
    module.on_before_optimizer_step(None)
    after = biases(module)
    assert all(own.any() for own in after.values())
    module.on_before_optimizer_step(None)
    torch.testing.assert_close(biases(module), after, rtol=0, atol=0)


def test_an_even_load_moves_nothing_and_a_busy_expert_loses():
    module = smora(experts=4, top_k=1)
    module._loads = {SLOT: torch.tensor([5, 5, 5, 5])}
    module.on_before_optimizer_step(None)
    assert not biases(module)[SLOT].any()
    module._loads = {SLOT: torch.tensor([9, 5, 5, 1])}
    module.on_before_optimizer_step(None)
    assert biases(module)[SLOT].tolist() == pytest.approx([-STEP, 0, 0, STEP])


def test_the_bias_decides_who_is_chosen_and_is_a_part_of_the_checkpoint():
    module, batch = smora(), random_batch()
    before = loads(module, batch)[SLOT]
    module.adapted[SLOT].router.bias[3] = 5.0
    after = loads(module, batch)[SLOT]
    assert after[3] == batch["attention_mask"].sum() > before[3]
    other = smora()
    other.load_state_dict(module.adapter_state())
    assert torch.equal(loads(other, batch)[SLOT], after)


def test_weights_sum_to_k_and_even_scores_weigh_one():
    router = smora().adapted[SLOT].router
    weights = router.rule(torch.randn(2, 5, E))
    torch.testing.assert_close(weights.sum(-1), torch.full((2, 5), float(K)))
    assert ((weights > 0).sum(-1) == K).all()
    assert router.rule(torch.zeros(1, 1, E)).sort().values.flatten().tolist() == [0, 0, 0, 0, 1, 1]
