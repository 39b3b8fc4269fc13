"""The router of experts, against its formula."""

import pytest
import torch
from torch.nn import functional

from moe_peft.layers.expert_router import LinearRouter

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
