"""Parameter groups, their rates, and the schedule against factors computed by hand."""

import math

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from moe_peft.methods.lora import LoRA
from moe_peft.methods.more import MoRE
from moe_peft.methods.trex import TRex
from moe_peft.optim import LearningRates, WarmupDecay, WeightDecays, optimizer_groups, parameter_groups
from tests.tiny import build, fit_prior, random_batch


def names_of(module):
    """Returns the group of every trainable parameter, by name."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    return {names[id(p)]: group for group, members in parameter_groups(module).items() for p in members}


@pytest.mark.parametrize("kind", ["causal", "classifier"])
def test_every_trainable_parameter_is_in_exactly_one_group(kind):
    module = build(TRex, kind, clusters=5)
    groups = parameter_groups(module)
    members = [id(parameter) for group in groups.values() for parameter in group]
    assert len(members) == len(set(members))
    assert set(members) == {id(p) for p in module.parameters() if p.requires_grad}
    ends = {"A": "adapters", "B": "adapters", "omega": "gates", "magnitude": "gates", "projection": "routers"}
    for name, group in names_of(module).items():
        expected = "heads" if name.startswith("heads.") else ends.get(name.rsplit(".", 1)[-1], "routers")
        assert group == expected, name
    assert list(groups) == ["adapters", "routers", "gates", "heads"][: 4 if kind == "classifier" else 3]


@pytest.mark.parametrize("options", [{}, {"embedding_dim": 6}, {"selector": "random"}], ids=str)
def test_a_rank_selector_and_its_task_embeddings_are_routers(options):
    groups = names_of(build(MoRE, "classifier", **options))
    assert set(groups.values()) == {"adapters", "routers", "heads"}
    for name, group in groups.items():
        assert group == ("adapters" if ".factors." in name else "heads" if name.startswith("heads.") else "routers")
    assert any("embedding" in name for name in groups)


def test_empty_groups_are_left_out():
    assert list(parameter_groups(build(LoRA))) == ["adapters"]


def test_groups_do_not_depend_on_the_parameters_state():
    module = build(TRex)
    before = names_of(module)
    for parameter in module.parameters():
        parameter.data.fill_(1.0)
    assert names_of(module) == before


def settings(module, rates, decays, defaults):
    """Returns every group's rate and decay in an optimizer whose own are 0.1 and 0.01."""
    groups = optimizer_groups(module, rates, decays, defaults)
    optimizer = torch.optim.AdamW(groups, lr=0.1, weight_decay=0.01)
    return {group["name"]: (group["lr"], group["weight_decay"]) for group in optimizer.param_groups}


def test_rates_and_decays_reach_their_groups_and_others_keep_the_methods_or_the_optimizers_own():
    module = build(TRex, "classifier")
    rates, decays = LearningRates(routers=0.2, heads=0.0), WeightDecays(gates=0.5)
    expected = {"adapters": (0.1, 0.01), "routers": (0.2, 0.01), "gates": (0.1, 0.5), "heads": (0.0, 0.01)}
    assert settings(module, rates, decays, {}) == expected
    own = {"gates": 0.3, "routers": 0.4, "adapters": 0.5}
    expected |= {"gates": (0.3, 0.5), "adapters": (0.5, 0.01)}
    assert settings(module, rates, decays, own) == expected


@pytest.mark.parametrize(
    ("method", "own"), [(LoRA, {}), (TRex, {"gates": 5e-5}), (MoRE, {"routers": 1e-2})], ids=["LoRA", "TRex", "MoRE"]
)
def test_a_methods_own_rates(method, own):
    """Fixed by the official T-REX, and for MoRE where ranks move; the rest is the optimizer's."""
    module = build(method, optimizer=lambda groups: torch.optim.AdamW(groups, lr=0.1), scheduler=None)
    found = {group["name"]: group["lr"] for group in module.configure_optimizers().param_groups}
    assert found == {name: own.get(name, 0.1) for name in found} and own.keys() <= found.keys()


@pytest.mark.parametrize("group", ["adapters", "routers", "gates", "heads"])
def test_a_negative_rate_is_refused(group):
    with pytest.raises(ValueError, match=f"{group}: -0.1 is negative"):
        LearningRates(**{group: -0.1})


def schedule(total_steps: int | None = 20, lrs=(1.0,), **options):
    parameters = [{"params": [nn.Parameter(torch.zeros(1))], "lr": lr} for lr in lrs]
    optimizer = torch.optim.SGD(parameters)
    return optimizer, WarmupDecay(optimizer, total_steps=total_steps, **options)


def rates(optimizer, scheduler, steps):
    found = []
    for _ in range(steps):
        found.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize("warmup", [4, 0.2])
@pytest.mark.parametrize(
    ("decay", "after"),
    [
        ("constant", lambda step: 1.0),
        ("linear", lambda step: 1 - (step - 4) / 16),
        ("cosine", lambda step: (1 + math.cos(math.pi * (step - 4) / 16)) / 2),
    ],
)
def test_the_factors_by_hand(warmup, decay, after):
    expected = [1 / 5, 2 / 5, 3 / 5, 4 / 5] + [after(step) for step in range(4, 20)]
    found = rates(*schedule(warmup=warmup, decay=decay), 20)
    assert [rate for (rate,) in found] == pytest.approx(expected)


def test_the_rate_is_zero_at_the_end_and_stays_there():
    optimizer, scheduler = schedule(warmup=0, decay="linear")
    assert rates(optimizer, scheduler, 22)[20:] == [[0.0], [0.0]]


def test_no_warm_up_starts_at_the_full_rate():
    assert rates(*schedule(warmup=0, decay="constant"), 2) == [[1.0], [1.0]]


def test_a_warm_up_of_one_step_is_a_step_and_not_a_share():
    assert [rate for (rate,) in rates(*schedule(warmup=1, decay="constant"), 3)] == [0.5, 1.0, 1.0]


def test_every_group_is_scaled_from_its_own_rate():
    assert rates(*schedule(lrs=(1.0, 0.1), warmup=4), 1) == [[0.2, pytest.approx(0.02)]]


def test_the_length_is_filled_in_once_and_acts_at_the_first_step():
    optimizer, scheduler = schedule(None, warmup=0.2)
    scheduler.set_total_steps(20)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1 / 5)
    scheduler.set_total_steps(1000)
    assert scheduler.total_steps == 20


def test_a_given_length_wins():
    optimizer, scheduler = schedule(20, warmup=0.2)
    scheduler.set_total_steps(1000)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1 / 5)


def test_the_schedule_survives_a_save():
    optimizer, scheduler = schedule(20, warmup=4)
    rates(optimizer, scheduler, 3)
    other_optimizer, other = schedule(20, warmup=4)
    other.load_state_dict(scheduler.state_dict())
    other_optimizer.load_state_dict(optimizer.state_dict())
    assert rates(other_optimizer, other, 5) == rates(optimizer, scheduler, 5)


def test_a_resumed_longer_fit_follows_its_own_length():
    """Else every step past the old end is taken at a rate of zero, whatever max_steps says."""
    optimizer, scheduler = schedule(20, warmup=0)
    rates(optimizer, scheduler, 20)
    longer_optimizer, longer = schedule(None, warmup=0)
    longer.set_total_steps(40)
    longer_optimizer.load_state_dict(optimizer.state_dict())
    longer.load_state_dict(scheduler.state_dict())
    assert rates(longer_optimizer, longer, 3)[1:] == [[pytest.approx(1 - 21 / 40)], [pytest.approx(1 - 22 / 40)]]


def test_a_negative_warm_up_is_refused():
    with pytest.raises(ValueError, match="warmup: -1 is negative"):
        schedule(warmup=-1)


def test_a_fit_steps_the_schedule_every_optimizer_step(tmp_path):
    """Two micro-batches per step, three steps: the gates' rate follows the schedule, from its own start."""
    seen = []

    class Watch(pl.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            seen.append({group["name"]: group["lr"] for group in optimizer.param_groups})

    module = build(TRex, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-3), scheduler=lambda o: WarmupDecay(o, 2))
    fit_prior(module)
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=4, accumulate_grad_batches=2, callbacks=[Watch()], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(module, DataLoader([random_batch(2)] * 8, batch_size=None))
    factors = [1 / 3, 2 / 3, 1.0, 0.5]
    assert [step["gates"] for step in seen] == pytest.approx([5e-5 * factor for factor in factors])
    assert [step["adapters"] for step in seen] == pytest.approx([1e-3 * factor for factor in factors])


def named_schedule(**options):
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "name": name} for name in ("adapters", "routers", "gates")]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    return optimizer, WarmupDecay(optimizer, total_steps=20, **options)


def test_a_span_gives_a_group_a_warm_up_and_a_decay_of_its_own():
    optimizer, scheduler = named_schedule(warmup=0.25)
    scheduler.set_span("adapters", 0, 8)
    scheduler.set_span("routers", 8, 12)
    adapters, routers, gates = zip(*rates(optimizer, scheduler, 21), strict=True)
    assert adapters == pytest.approx([1 / 3, 2 / 3] + [1 - step / 6 for step in range(6)] + [0] * 13)
    assert routers == pytest.approx([0] * 8 + [1 / 4, 2 / 4, 3 / 4] + [1 - step / 9 for step in range(9)] + [0])
    assert gates == pytest.approx([(step + 1) / 6 for step in range(5)] + [1 - step / 15 for step in range(16)])


def test_a_span_acts_at_once_and_a_constant_rate_ends_with_it():
    optimizer, scheduler = named_schedule(warmup=0, decay="constant")
    rates(optimizer, scheduler, 3)
    scheduler.set_span("adapters", 0, 3)
    scheduler.set_span("routers", 5, 1)
    assert [group["lr"] for group in optimizer.param_groups] == [0, 0, 1]
    assert rates(optimizer, scheduler, 4) == [[0, 0, 1], [0, 0, 1], [0, 1, 1], [0, 0, 1]]


def test_spans_come_from_the_run_and_not_from_its_checkpoint():
    optimizer, scheduler = named_schedule(warmup=0)
    scheduler.set_span("adapters", 0, 4)
    rates(optimizer, scheduler, 2)
    other_optimizer, other = named_schedule(warmup=0)
    other_optimizer.load_state_dict(optimizer.state_dict())
    other.load_state_dict(scheduler.state_dict())
    assert other.spans == {}
    other.set_span("adapters", 0, 8)
    assert rates(other_optimizer, other, 1) == [[pytest.approx(1 - 2 / 8), *[pytest.approx(1 - 2 / 20)] * 2]]
