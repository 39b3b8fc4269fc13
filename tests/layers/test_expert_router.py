"""The router of experts, against its formula."""

import pytest
import torch
from torch.nn import functional

from moe_peft.layers.expert_router import DECAY, LinearRouter

WIDTH, EXPERTS, ROWS = 8, 3, 4


def router(**options):
    torch.manual_seed(0)
    made, features = LinearRouter(**options), torch.randn(ROWS, WIDTH) * 3 + 1
    made.build(WIDTH, EXPERTS)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter)
    return made, features


def normal(features):
    spread = features.var(-1, correction=0, keepdim=True)
    return (features - features.mean(-1, keepdim=True)) / (spread + 1e-5).sqrt()


@pytest.mark.parametrize("normalise", [True, False])
def test_scores_by_hand_and_without_noise_outside_of_training(normalise):
    made, features = router(normalise=normalise)
    expected = (normal(features) if normalise else features) @ made.gate.weight.T
    torch.testing.assert_close(made.eval()(features), expected)
    assert torch.equal(made(features), made(features))


def test_noise_has_the_spread_of_its_own_linear_and_no_bias():
    made, features = router(normalise=False)
    features = features / 4  # a softplus far from its ends
    draws = torch.stack([made.train()(features) for _ in range(4000)])
    spread = functional.softplus(features @ made.noise.weight.T + made.noise.bias)
    assert spread.max() > 2 * spread.min() > 0
    torch.testing.assert_close(draws.std(0), spread, rtol=0.05, atol=0)
    assert ((draws.mean(0) - made.eval()(features)).abs() < 4 * spread / 4000**0.5).all()


def test_noise_can_be_left_out():
    made, features = router(noise=False)
    assert torch.equal(made.train()(features), made.eval()(features))
    assert [name for name, _ in made.named_parameters()] == ["gate.weight"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_costs_no_precision(dtype):
    made, features = router()
    features = features.to(dtype)
    expected = made.eval()(features)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(made(features), expected)
    assert expected.dtype == torch.float32


@pytest.mark.parametrize(("experts", "numbers"), [(3, 12_291), (6, 24_582), (10, 40_970), (17, 69_649)])
def test_the_published_sizes(experts, numbers):
    made = LinearRouter()
    made.build(2048, experts, "meta")
    assert sum(parameter.numel() for parameter in made.parameters()) == numbers


# ---- one more expert -------------------------------------------------------------------------------------------------


def planted(count=60, spread=1.0):
    """Rows of three experts that the router tells apart, and of a fourth, whose place lies between theirs."""
    generator = torch.Generator().manual_seed(3)
    own = torch.arange(count) % 4
    places = torch.cat([4 * torch.eye(3, WIDTH), torch.full((1, WIDTH), 1.0)])
    made = LinearRouter(normalise=False)
    made.build(WIDTH, 4)
    made.gate.weight.data.copy_(torch.cat([2 * torch.eye(3, WIDTH), torch.zeros(1, WIDTH)]))
    return made.eval(), places[own] + spread * torch.randn(count, WIDTH, generator=generator), own


def objective(made, features, own, row, new=3):
    """The cross-entropy of all rows, by the plain formula in fp64, were the new expert's row this one."""
    weight = torch.cat(
        [made.gate.weight.detach().double()[:new], row[None], made.gate.weight.detach().double()[new + 1 :]]
    )
    return functional.cross_entropy(made.prepare(features).double() @ weight.T, own) + DECAY * row.square().sum()


@pytest.mark.parametrize("new", [3, 1])
@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("spread", [0.3, 3.0], ids=["separable", "mixed up"])
def test_an_added_experts_row_is_the_optimum_of_the_cross_entropy_of_all_rows(new, normalise, spread):
    made, features, own = planted(spread=spread)
    made.normalise = normalise
    made.add(new, features, own)
    row = made.gate.weight[new].detach().double().requires_grad_()
    best = objective(made, features, own, row, new)
    (gradient,) = torch.autograd.grad(best, row)
    (far,) = torch.autograd.grad(
        objective(made, features, own, start := torch.zeros_like(row, requires_grad=True), new), start
    )
    assert gradient.abs().max() < 1e-4 * far.abs().max()
    for step in torch.eye(WIDTH, dtype=torch.float64) * 1e-2:
        assert (
            min(objective(made, features, own, row + step, new), objective(made, features, own, row - step, new)) > best
        )


def test_an_added_expert_gets_its_rows_and_leaves_all_other_numbers_as_they_are():
    made, features, own = planted(spread=0.3)
    before = {name: value.clone() for name, value in made.state_dict().items()}
    assert (made(features).argmax(-1) == own)[own != 3].all()
    made.add(3, features, own)
    assert ((made(features).argmax(-1) == own).float().mean()) > 0.99
    for name, value in made.state_dict().items():
        kept = slice(0, 3) if name == "gate.weight" else slice(None)
        assert torch.equal(value[kept], before[name][kept]), name
    assert made.gate.weight.grad is None and made.gate.weight.requires_grad


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_an_expert_can_be_added_where_nothing_else_learns(mode):
    (made, features, own), (other, *_) = planted(), planted()
    made.add(3, features, own)
    with mode():
        other.add(3, features.clone(), own.clone())
    assert torch.equal(other.gate.weight, made.gate.weight)


def test_scores_of_others_under_autocast_leave_the_added_row_as_it_is():
    (made, features, own), (other, *_) = planted(), planted()
    made.add(3, features, own)
    with torch.autocast("cpu", torch.bfloat16):
        other.add(3, features, own)
    assert torch.equal(other.gate.weight, made.gate.weight)
