"""Nested experts on one linear: each is plain LoRA of the first ranks, times its constant."""

import pytest
import torch

from moe_peft.layers.nested_experts import nested_experts
from tests.layers.tiny_selector import (
    COMPONENTS,
    CONSTANTS,
    LEARNED,
    SCALE,
    SCALINGS,
    R,
    T,
    agree,
    begin,
    expert_output,
    force,
    inputs,
    layer,
)


@pytest.mark.parametrize("scaling", CONSTANTS)
def test_an_expert_is_a_prefix_times_its_constant(scaling):
    expected = [[c if j < k else 0.0 for j in range(R)] for k, c in enumerate(CONSTANTS[scaling], start=1)]
    agree(nested_experts([1, 2, 3, 4], R, T, scaling), torch.tensor(expected), 1e-7)


def test_the_codes_scaling_is_per_component_and_the_same_in_every_expert():
    expected = [[s if j < k else 0.0 for j, s in enumerate(COMPONENTS)] for k in range(1, R + 1)]
    agree(nested_experts([1, 2, 3, 4], R, T, "code"), torch.tensor(expected), 1e-7)


def test_experts_of_chosen_ranks():
    expected = torch.tensor([[2 / 8] * 2 + [0.0] * 6, [5 / 8] * 5 + [0.0] * 3, [1.0] * 8])
    agree(nested_experts([2, 5, 8], 8, T, "rank_over_r"), expected, 1e-7)


def test_the_papers_scaling_equals_the_default_where_there_are_as_many_tasks_as_ranks():
    paper, default = (nested_experts(range(1, 9), 8, 8, scaling) for scaling in ("paper", "rank_over_r"))
    assert torch.equal(paper, default)


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("selector", LEARNED)
@pytest.mark.parametrize("k", range(1, R + 1))
def test_a_forced_rank_is_plain_lora_of_the_first_k_ranks(selector, scaling, k):
    adapted, x = layer(selector, scaling), inputs([0, 1])
    force(adapted, [k - 1] * T)
    begin(adapted.context, [0, 1])
    assert adapted.router.ranks().tolist() == [k] * T
    expected = expert_output(adapted, x, k, scaling)
    assert expected.abs().max() > 0.01
    agree(adapted(x), adapted.base(x) + expected, 1e-6)  # the constants are fp32
    if scaling == "none":
        agree(adapted(x), adapted.base(x) + SCALE * (x @ adapted.factors.A[:k].mT) @ adapted.factors.B[:, :k].mT)


def test_neighbouring_experts_differ_by_one_rank_one_term():
    adapted, x, outputs = layer("fixed", "none"), inputs([0]), []
    for k in range(R):
        adapted.router.start.fill_(k)
        begin(adapted.context, [0])
        outputs.append(adapted.delta(x))
    for k in range(1, R):
        a, b = adapted.factors.A[k], adapted.factors.B[:, k]
        assert (x @ a).abs().max() > 0.01
        agree(outputs[k] - outputs[k - 1], SCALE * (x @ a)[..., None] * b)


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("selector", LEARNED)
def test_no_gradient_at_all_above_the_chosen_rank(selector, scaling):
    adapted, x = layer(selector, scaling), inputs([0, 1])
    force(adapted, [1, 2, 3])
    begin(adapted.context, [0, 1])
    adapted(x).square().sum().backward()
    a, b = adapted.factors.A.grad, adapted.factors.B.grad
    assert not a[3:].any() and not b[:, 3:].any()
    assert (a[:3].abs().amax(1) > 0).all() and (b[:, :3].abs().amax(0) > 0).all()
