"""Experts that learn as one for some epochs, then apart."""

import pytest
import torch

from moe_peft.callbacks.freeze_then_route import FreezeThenRoute
from moe_peft.callbacks.shared_start import SharedStart
from moe_peft.layers.expert_router import LinearRouter
from moe_peft.methods.lora import LoRA
from tests.callbacks.test_freeze_then_route_running import Saving
from tests.callbacks.tiny_stages import EPOCH, Watch, fit, scripted, weights
from tests.methods.tiny_tt import KINDS, TASKS
from tests.tiny import build


def cores(state):
    """The stacked cores of a state."""
    return {name: value for name, value in state.items() if ".factors." in name}


def alike(core):
    """Whether all experts are the same, to the bit."""
    return all(torch.equal(core[0], other) for other in core)


class Gradients(Watch):
    """Keeps every step's gradients as they leave backward."""

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.gradients = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", KINDS)
def test_experts_are_one_for_some_epochs_and_then_go_apart(tmp_path, kind):
    module = scripted(kind)
    stages = FreezeThenRoute(experts_epochs=2)
    _, watch = fit(module, tmp_path, stages, SharedStart(), epochs=3, gradient_clip_val=0.01)
    shared, apart = watch.after[EPOCH - 1], watch.after[2 * EPOCH - 1]
    assert len(cores(shared)) > 0 and all(
        alike(core) for after in watch.after[:EPOCH] for core in cores(after).values()
    )
    assert not any(alike(core) for core in cores(apart).values())
    assert all(not torch.equal(value, shared[name]) for name, value in cores(watch.after[0]).items())
    heads = [value for name, value in shared.items() if name.startswith("heads.")]
    assert bool(heads) == (kind == "classifier") and not any(alike(value) for value in heads)


def sgd(rate):
    """Plain steps: a difference of weights is a gradient."""
    return lambda groups: torch.optim.SGD(groups, lr=rate)


def test_a_step_takes_the_mean_of_the_experts_gradients(tmp_path):
    module, still, seen = scripted(optimizer=sgd(0.5)), scripted(optimizer=sgd(0.0)), Gradients()
    before = cores(weights(module))
    _, watch = fit(module, tmp_path, None, SharedStart(), epochs=1, batches=1)
    with torch.no_grad():
        for name, parameter in still.named_parameters():
            if name in before:
                parameter.copy_(before[name][:1].expand_as(parameter))
    fit(still, tmp_path, None, seen, epochs=1, batches=1)
    for name, start in before.items():
        expected = start[:1] - 0.5 * seen.gradients[name].mean(0, keepdim=True)
        torch.testing.assert_close(watch.after[0][name], expected.expand_as(start))
        assert seen.gradients[name].abs().amax() > 0


@pytest.mark.parametrize("step", [4, 8], ids=["as one", "apart"])
def test_a_resumed_fit_goes_on_to_the_bit(tmp_path, step):
    def callbacks():
        return FreezeThenRoute(experts_epochs=3), SharedStart(2)

    whole, again = (scripted("causal", router=LinearRouter(noise=False)) for _ in range(2))
    _, watch = fit(whole, tmp_path / "whole", *callbacks(), Saving(), epochs=4)
    _, resumed = fit(again, tmp_path / "again", *callbacks(), epochs=4, resume=tmp_path / f"whole/{step}.ckpt")
    assert resumed.losses == watch.losses[step:] and len(resumed.losses) == 4 * EPOCH - step
    assert all(torch.equal(value, weights(again)[name]) for name, value in weights(whole).items())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"experts_epochs": 1}, "epochs 1 leaves no step to go apart before FreezeThenRoute ends stage one"),
        ({"experts_steps": 4}, "epochs 1 leaves no step to go apart"),
        (
            {"experts_epochs": 2, "patience": 1},
            "FreezeThenRoute's patience may end stage one while all experts are one",
        ),
    ],
)
def test_stages_in_which_experts_never_go_apart_are_refused(tmp_path, given, message):
    with pytest.raises(ValueError, match=f"SharedStart: {message}"):
        fit(scripted(), tmp_path, FreezeThenRoute(**given), SharedStart(), epochs=3)


def test_mistakes_are_refused(tmp_path):
    with pytest.raises(ValueError, match="SharedStart: epochs is 0, it must be at least 1"):
        SharedStart(0)
    with pytest.raises(ValueError, match="SharedStart: LoRA has no experts of tasks; drop this callback"):
        fit(build(LoRA, tasks=TASKS), tmp_path, None, SharedStart(), epochs=1)
