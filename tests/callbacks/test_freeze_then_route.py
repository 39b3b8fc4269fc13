"""Experts first, then the router: where the stages meet, what each of them moves, and which experts are frozen."""

import math

import pytest
import torch

from moe_peft.callbacks.freeze_then_route import EXPERTS, ROUTER, FreezeThenRoute
from moe_peft.methods.lora import LoRA
from moe_peft.optim import WarmupDecay
from tests.callbacks.tiny_stages import adamw, fit, moved, scripted, weights
from tests.methods.tiny_tt import KINDS, TASKS
from tests.tiny import build

OPTIMIZERS = {
    "adamw": adamw,
    "sgd": lambda groups: torch.optim.SGD(groups, lr=1e-2, momentum=0.9, weight_decay=0.1),
}


def boundary(watch):
    """How many steps were of stage one; all that follow are of stage two."""
    steps = watch.closed.count(ROUTER)
    assert watch.closed == [ROUTER] * steps + [EXPERTS] * (len(watch.closed) - steps)
    return steps


# ---- where the stages meet -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stages", "trainer", "steps"),
    [
        ({"experts_steps": 3}, {}, 3),
        ({"experts_steps": 5}, {}, 5),
        ({"experts_epochs": 2}, {}, 8),
        ({"experts_epochs": 2}, {"accumulate_grad_batches": 2}, 4),
        ({"experts_epochs": 2}, {"accumulate_grad_batches": 3}, 4),  # 4 batches are a step of 3 and one of 1
        ({"experts_steps": 3}, {"accumulate_grad_batches": 2}, 3),
    ],
    ids=str,
)
def test_the_boundary_is_counted_in_optimizer_steps_or_epochs(tmp_path, stages, trainer, steps):
    made, watch = fit(scripted(), tmp_path, FreezeThenRoute(**stages), **trainer)
    assert boundary(watch) == steps < made.global_step == len(watch.closed)


def test_without_the_callback_all_learn_side_by_side(tmp_path):
    module = scripted()
    _, watch = fit(module, tmp_path, None, epochs=1)
    assert set(watch.closed) == {frozenset()}
    assert watch.learned == [{"adapters", "routers"}] * 4


UP_DOWN = [(0.1, 0.2, 0.3), (0.2, 0.1, 0.3), (0.2, 0.1, 0.3), (0.2, 0.2, 0.1), (0.9, 0.9, 0.9)]


@pytest.mark.parametrize(("patience", "steps"), [(1, 12), (2, 16), (3, 20), (None, 20)])
def test_stage_one_ends_where_no_expert_has_improved_for_long(tmp_path, patience, steps):
    """Validations 3 and 4 bring nothing new, 5 does."""
    _, watch = fit(scripted("causal", *UP_DOWN), tmp_path, FreezeThenRoute(None, 5, patience), epochs=7)
    assert boundary(watch) == steps


def test_validations_within_an_epoch_count_for_patience(tmp_path):
    module = scripted("causal", (0.5, 0.5, 0.5))
    _, watch = fit(module, tmp_path, FreezeThenRoute(12, patience=3), val_check_interval=2)
    assert boundary(watch) == 8


# ---- what each stage moves -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_10_11_a_stage_moves_its_own_and_leaves_all_else_to_the_bit(tmp_path, kind, optimizer):
    """Decay and momentum are on; gates and clipping too."""
    module = scripted(kind, optimizer=OPTIMIZERS[optimizer])
    start = weights(module)
    _, watch = fit(module, tmp_path, FreezeThenRoute(8, keep_best=False), gradient_clip_val=0.5)
    experts = {"adapters", "heads"} if kind == "classifier" else {"adapters"}
    assert moved(start, watch.after[0]) == moved(watch.after[0], watch.after[7]) == experts
    assert moved(watch.after[7], watch.after[8]) == moved(watch.after[8], watch.after[-1]) == {"routers"}
    assert watch.learned == [experts] * 8 + [{"routers"}] * 8
    changed = {name for name, value in watch.after[7].items() if not torch.equal(value, watch.after[-1][name])}
    assert changed == {"router.gate.weight", "router.noise.weight", "router.noise.bias"}


def test_10_frozen_heads_stay_in_stage_one(tmp_path):
    module = scripted("classifier", train_heads=False)
    start = weights(module)
    _, watch = fit(module, tmp_path, FreezeThenRoute(8))
    assert moved(start, watch.after[7]) == {"adapters"} and moved(start, watch.after[-1]) == {"adapters", "routers"}


@pytest.mark.parametrize("kind", KINDS)
def test_zero_gradients_would_not_freeze_them(tmp_path, kind, monkeypatch):
    """Else the tests above could not fail: decay and momentum go on."""
    monkeypatch.setattr(FreezeThenRoute, "on_before_optimizer_step", lambda *_: None)
    _, watch = fit(scripted(kind), tmp_path, FreezeThenRoute(8, keep_best=False))
    assert "adapters" in moved(watch.after[7], watch.after[-1])


def test_with_straight_through_the_task_loss_trains_the_router_alone(tmp_path):
    module = scripted(straight_through=True, router_weight=1e-9)
    _, watch = fit(module, tmp_path, FreezeThenRoute(8, keep_best=False))
    assert moved(watch.after[7], watch.after[-1]) == {"routers"}
    assert watch.losses[8] > 1e-3, "the task loss is in the loss"


@pytest.mark.parametrize("name", ["core", "router"])
def test_a_number_that_is_none_raises_the_alarm_in_any_stage(tmp_path, name):
    """The router has no part in stage one."""
    module = scripted()
    core = next(iter(module.adapted.values())).factors.cores[0]
    (core if name == "core" else module.router.gate.weight).data[0, 0] = math.nan
    with pytest.raises(ValueError, match="^the loss is not finite at step 0: nan for rows row0, row1, .* of task0, "):
        fit(module, tmp_path, FreezeThenRoute(8))


# ---- which experts are frozen ----------------------------------------------------------------------------------------


def expert(state, task):
    """One expert's numbers."""
    owner = torch.tensor([task for task, spec in enumerate(TASKS) for _ in spec.choices])
    cores = {name: value[task] for name, value in state.items() if ".factors." in name}
    return cores | {name: value[owner == task] for name, value in state.items() if name.startswith("heads.")}


@pytest.mark.parametrize("kind", ["causal", "classifier"])
def test_every_expert_is_frozen_as_it_was_when_its_own_validation_was_best(tmp_path, kind):
    script = [(0.1, 0.9, 0.5), (0.3, 0.2, 0.5), (0.2, 0.9, 0.6), (1.0, 1.0, 1.0)]
    best = [1, 0, 2]  # of equals the first; what comes after the switch does not count
    _, watch = fit(scripted(kind, *script), tmp_path, FreezeThenRoute(None, 3), epochs=4)
    for task, validation in enumerate(best):
        own, frozen = expert(watch.validated[validation], task), expert(watch.after[-1], task)
        assert own and all(torch.equal(value, frozen[name]) for name, value in own.items())
        for other in {0, 1, 2} - {validation}:
            for name, value in expert(watch.validated[other], task).items():
                assert not torch.equal(value, frozen[name]), name


def test_experts_stay_as_the_last_step_left_them_where_wanted(tmp_path):
    script = [(0.9, 0.9, 0.9), (0.1, 0.1, 0.1)]
    _, watch = fit(scripted("causal", *script), tmp_path, FreezeThenRoute(6, keep_best=False))
    assert moved(watch.after[5], watch.after[-1]) == {"routers"}


@pytest.mark.parametrize("value", [None, math.nan], ids=["no value", "nan"])
def test_an_expert_without_validations_is_frozen_as_it_was_at_the_last_one(tmp_path, value):
    script = [(0.9, 0.1, value), (0.2, 0.2, value), (0.1, 0.1, value)]
    _, watch = fit(scripted("causal", *script), tmp_path, FreezeThenRoute(None, 3), epochs=4)
    for task, validation in enumerate([0, 1, 2]):
        frozen = expert(watch.after[-1], task)
        assert all(torch.equal(own, frozen[name]) for name, own in expert(watch.validated[validation], task).items())


def test_no_validation_before_the_boundary_leaves_the_experts_alone(tmp_path):
    _, watch = fit(scripted(), tmp_path, FreezeThenRoute(3), check_val_every_n_epoch=2)
    assert moved(watch.after[2], watch.after[-1]) == {"routers"}


# ---- schedule and optimizer state ------------------------------------------------------------------------------------


def test_each_stage_has_a_learning_rate_schedule_of_its_own(tmp_path):
    module = scripted("classifier", scheduler=lambda optimizer: WarmupDecay(optimizer, warmup=2, decay="linear"))
    _, watch = fit(module, tmp_path, FreezeThenRoute(6))
    first = [1 / 3, 2 / 3, *(1 - step / 4 for step in range(4))]
    second = [1 / 3, 2 / 3, *(1 - step / 8 for step in range(8))]
    for name, rate, factors in (
        ("adapters", 1e-2, first + [0] * 10),
        ("heads", 1e-2, first + [0] * 10),
        ("routers", 1e-3, [0] * 6 + second),
    ):
        assert [step[name] for step in watch.rates] == pytest.approx([rate * factor for factor in factors]), name


def test_a_stage_one_that_ends_early_gives_its_steps_to_the_router(tmp_path):
    module = scripted(scheduler=lambda optimizer: WarmupDecay(optimizer, warmup=0, decay="linear"))
    _, watch = fit(module, tmp_path, FreezeThenRoute(12, patience=1))
    assert boundary(watch) == 8
    assert [step["routers"] for step in watch.rates][8:] == pytest.approx([1e-3 * (1 - step / 8) for step in range(8)])


class Planted(torch.optim.AdamW):
    """Has state for every parameter before its first step, as after a resume under FSDP2."""

    def step(self, closure=None):
        for group in self.param_groups if not self.state else ():
            for parameter in group["params"]:
                own = torch.full_like(parameter, 0.5)
                self.state[parameter] = {"step": torch.tensor(7.0), "exp_avg": own, "exp_avg_sq": own.clone()}
        return super().step(closure)


def test_the_routers_optimizer_state_starts_fresh(tmp_path):
    module = scripted(optimizer=lambda groups: Planted(groups, lr=1e-2))
    made, _ = fit(module, tmp_path, FreezeThenRoute(10))
    state = made.optimizers[0].state
    assert state[module.router.gate.weight]["step"] == 6
    core = next(iter(module.adapted.values())).factors.cores[0]
    assert state[core]["step"] == 7 + 10, "what stays frozen keeps its own"


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [{}, {"experts_steps": 3, "experts_epochs": 1}], ids=["none", "both"])
def test_the_boundary_must_be_given_once(given):
    with pytest.raises(ValueError, match="^FreezeThenRoute: give experts_steps or experts_epochs, the length of stage"):
        FreezeThenRoute(**given)


@pytest.mark.parametrize("name", ["experts_steps", "experts_epochs", "patience"])
def test_numbers_below_one_are_refused(name):
    with pytest.raises(ValueError, match=f"FreezeThenRoute: {name} is 0, it must be at least 1"):
        FreezeThenRoute(**{"experts_steps": 3} | ({} if name == "patience" else {"experts_steps": None}) | {name: 0})


@pytest.mark.parametrize("steps", [16, 17])
def test_a_stage_one_that_leaves_no_step_for_the_router_is_refused(tmp_path, steps):
    with pytest.raises(ValueError, match=f"stage one ends at step {steps} of 16, which leaves the router untrained"):
        fit(scripted(), tmp_path, FreezeThenRoute(steps))


def test_a_method_without_experts_is_refused(tmp_path):
    module = build(LoRA, tasks=TASKS)
    with pytest.raises(ValueError, match="^FreezeThenRoute: LoRA has no experts; drop this callback$"):
        fit(module, tmp_path, FreezeThenRoute(3))
