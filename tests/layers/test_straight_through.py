"""The rank selector's straight-through factor: exactly one forwards, its gradients by hand."""

import pytest
import torch
from torch import nn

from tests.layers.tiny_selector import ALL, LEARNED, SCALINGS, R, agree, begin, expert_output, inputs, layer


@pytest.mark.parametrize("selector", ALL)
def test_the_forward_factor_is_exactly_one(selector):
    for seed in range(20):
        router = layer(selector, seed=seed).router.float()
        p = router.probabilities()
        assert torch.equal(router.selection(p), nn.functional.one_hot(p.argmax(-1), R).float())
        assert selector in ("random", "fixed") or p.amax(-1).min() < 0.999


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("selector", LEARNED)
def test_the_gradient_of_p_by_hand(selector, scaling):
    """dL/dp_k = c_k <G, E_k> summed over the task's rows: for every k, or for the chosen one only."""
    tasks = [0, 2, 0, 2]
    adapted, x = layer(selector, scaling), inputs(tasks)
    begin(adapted.context, tasks)
    p = torch.tensor([[0.1, 0.2, 0.6, 0.1], [0.4, 0.3, 0.2, 0.1], [0.3, 0.4, 0.2, 0.1]], dtype=torch.float64)
    p.requires_grad_()
    adapted.router.probabilities = lambda: p
    y = adapted(x)
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    (found,) = torch.autograd.grad((y * g).sum(), p)
    chosen = {0: 2, 2: 1}
    expected = torch.zeros_like(p)
    for row, task in enumerate(tasks):
        for k in range(R):
            if selector == "full" or k == chosen[task]:
                expected[task, k] += (g[row] * expert_output(adapted, x, k + 1, scaling)[row]).sum().detach()
    assert expected[[0, 2]].abs().max() > 0.5 and not expected[1].any()
    agree(found, expected, 1e-5)


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("selector", LEARNED)
def test_the_gradients_of_gate_and_embedding_by_hand(selector, scaling):
    """From dL/dp through the softmax's Jacobian, dz = p (dp - <p, dp>), to W, b and the task embeddings."""
    tasks = [0, 2, 2]
    adapted, x = layer(selector, scaling), inputs(tasks)
    router = adapted.router
    begin(adapted.context, tasks)
    y = adapted(x)
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    (y * g).sum().backward()
    with torch.no_grad():
        e, w = router.embedding.weight, router.weight
        z = e @ w.mT + router.bias
        p = z.exp() / z.exp().sum(1, keepdim=True)
        dp = torch.zeros_like(p)
        for row, task in enumerate(tasks):
            for k in range(R):
                if selector == "full" or k == int(p[task].argmax()):
                    dp[task, k] += (g[row] * expert_output(adapted, x, k + 1, scaling)[row]).sum()
        dz = p * (dp - (p * dp).sum(1, keepdim=True))
    agree(router.weight.grad, dz.mT @ e, 1e-5)
    agree(router.bias.grad, dz.sum(0), 1e-5)
    agree(router.embedding.weight.grad, dz @ w, 1e-5)
    assert router.weight.grad.abs().max() > 1e-2
    reached = router.embedding.weight.grad.abs().amax(1) > 1e-3
    assert reached.tolist() == [True, False, True] and not router.embedding.weight.grad[1].any()


def test_a_zero_b_leaves_the_selector_without_gradient_and_the_output_at_the_base():
    adapted, x = layer(), inputs([0, 1, 2])
    adapted.factors.B.data.zero_()
    begin(adapted.context, [0, 1, 2])
    y = adapted(x)
    assert torch.equal(y, adapted.base(x))
    y.square().sum().backward()
    assert adapted.factors.B.grad.any()
    assert not any(parameter.grad.any() for parameter in adapted.router.parameters())
