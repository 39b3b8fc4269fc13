"""Clipping per expert, against torch's own clipping of each expert's numbers by themselves."""

import pytest
import torch
from torch.nn.utils import clip_grad_norm_

from moe_peft.layers.expert_router import LinearRouter
from moe_peft.methods.expert_clipping import clip_per_expert
from moe_peft.optim import parameter_groups
from tests.methods.tiny_tt import blank


def with_gradients(kind="classifier", **options):
    """A method whose gradients are random, of very different size from expert to expert."""
    module = blank(kind, router=LinearRouter(noise=False), **options)
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
            if parameter.shape[0] == 3:
                parameter.grad *= torch.tensor([1e-3, 0.1, 10.0]).view(-1, *(1,) * (parameter.dim() - 1))
    return module


def of_expert(module, expert):
    """One expert's gradients, as parameters that torch may clip."""
    groups = parameter_groups(module)
    parts = [core.grad[expert] for core in groups["adapters"]]
    parts += [head.grad[module.heads.owner == expert] for head in groups.get("heads", [])]
    alone = [torch.nn.Parameter(part.clone()) for part in parts]
    for parameter in alone:
        parameter.grad = parameter.data.clone()
    return alone


@pytest.mark.parametrize("bound", [1e-3, 0.5, 30.0, 1e4])
@pytest.mark.parametrize("options", [{}, {"train_heads": False}], ids=["heads", "frozen heads"])
def test_every_expert_is_clipped_as_torch_clips_it_alone(bound, options):
    module = with_gradients(**options)
    expected = [of_expert(module, expert) for expert in range(3)]
    bitten = [float(clip_grad_norm_(alone, bound)) > bound for alone in expected]
    assert bitten == {1e-3: [True] * 3, 0.5: [bool(module.heads.linear.weight.requires_grad), True, True]}.get(
        bound, [False, False, bound == 30.0]
    )
    clip_per_expert(module, bound)
    for expert, alone in enumerate(expected):
        for found, parameter in zip(of_expert(module, expert), alone, strict=True):
            torch.testing.assert_close(found.grad, parameter.grad, rtol=1e-5, atol=0)


def test_the_router_has_a_norm_of_its_own():
    module = with_gradients("causal")
    gate = module.router.gate.weight
    twin = torch.nn.Parameter(torch.zeros_like(gate))
    twin.grad = gate.grad.clone()
    clip_grad_norm_([twin], 0.5)
    clip_per_expert(module, 0.5)
    assert torch.equal(gate.grad, twin.grad)


@pytest.mark.parametrize("kind", ["causal", "classifier"])
def test_groups_without_gradients_are_left_alone(kind):
    module = with_gradients(kind)
    for name in ("adapters", "heads"):
        for parameter in parameter_groups(module).get(name, []):
            parameter.grad = None
    clip_per_expert(module, 0.5)
    assert module.router.gate.weight.grad.norm() == pytest.approx(0.5, rel=1e-4)
    assert all(core.grad is None for core in parameter_groups(module)["adapters"])


def test_an_expert_without_gradient_stays_without_and_harms_no_other():
    module = with_gradients()
    for core in parameter_groups(module)["adapters"]:
        core.grad[1] = 0
    module.heads.linear.weight.grad[module.heads.owner == 1] = 0
    module.heads.linear.bias.grad[module.heads.owner == 1] = 0
    clip_per_expert(module, 0.5)
    norms = [torch.cat([p.grad.flatten() for p in of_expert(module, expert)]).norm().item() for expert in range(3)]
    assert norms == pytest.approx([0.5, 0.0, 0.5], rel=1e-4)
