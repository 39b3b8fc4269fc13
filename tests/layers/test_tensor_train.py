"""Tensor trains over a matrix: every form of the product is the same matrix, and TensorLy agrees about which one."""

import math

import pytest
import tensorly
import torch

from moe_peft.layers.factors import TensorTrainFactors
from moe_peft.layers.tensor_train import Layout, balanced_modes, contract, fold, layout_of, reconstruct

SHAPES = {
    "llama3.2-1b q": ([16, 8, 4, 4], [4, 4, 8, 16]),
    "llama3.2-1b v": ([16, 16, 4, 2], [2, 16, 16]),
    "llama3.2-3b q": ([16, 4, 4, 3, 2, 2], [2, 2, 3, 4, 4, 16]),
    "llama3.2-3b v": ([16, 4, 4, 3, 2, 2], [2, 2, 4, 4, 16]),
    "llama3.1-8b q": ([16, 4, 4, 4, 2, 2], [2, 2, 4, 4, 4, 16]),
    "llama3.1-8b v": ([16, 4, 4, 4, 2, 2], [2, 2, 4, 4, 16]),
    "llama3.1-70b q": ([16, 4, 4, 4, 2, 2, 2], [2, 2, 2, 4, 4, 4, 16]),
    "llama3.1-70b v": ([16, 4, 4, 4, 2, 2, 2], [2, 2, 4, 4, 16]),
    "roberta-base": ([64, 4, 3], [3, 4, 64]),
    "roberta-base, rank 10, first code": ([12, 8, 8], [8, 8, 12]),
    "two cores": ([6], [10]),
    "clipped ranks": ([2, 3, 2], [2, 5]),
}


def train(shape, rank=5, seed=0, dtype=torch.float64):
    """A layout and seeded random cores of it."""
    layout = Layout(*map(tuple, shape))
    generator = torch.Generator().manual_seed(seed)
    cores = [torch.randn(size, generator=generator, dtype=dtype) / size[0] ** 0.5 for size in layout.shapes(rank)]
    return layout, [core.requires_grad_() for core in cores]


def by_tensorly(layout, cores):
    """The dense matrix as TensorLy makes the tensor and the documented index map orders its digits."""
    with tensorly.backend_context("pytorch"):  # pyright: ignore[reportAttributeAccessIssue]
        tensor = tensorly.tt_to_tensor(cores)
    digits = "abcdefghijklmnopqr"[: len(layout.modes)]
    inputs, outputs = digits[: len(layout.inputs)], digits[len(layout.inputs) :]
    tensor = torch.einsum(f"{digits}->{outputs}{inputs[::-1]}", tensor)
    return tensor.reshape(math.prod(layout.outputs), math.prod(layout.inputs))


LARGE = ("llama3.1-8b q", "llama3.1-70b q")  # their dense matrices take seconds and gigabytes in fp64
CHECKED = [pytest.param(shape, id=name, marks=[pytest.mark.slow] * (name in LARGE)) for name, shape in SHAPES.items()]


@pytest.mark.parametrize("shape", CHECKED)
def test_all_forms_and_tensorly_give_one_matrix_and_one_gradient(shape):
    layout, cores = train(shape)
    x = torch.randn(3, math.prod(layout.inputs), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    a, b = fold(cores, layout)
    forms = {
        "tensorly": x @ by_tensorly(layout, cores).mT,
        "fold": x @ a.mT @ b.mT,
        "contract": contract(x, cores, layout),
        "reconstruct": x @ reconstruct(cores, layout).mT,
    }
    weights = torch.randn(forms["fold"].shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    expected = torch.autograd.grad((forms["tensorly"] * weights).sum(), cores, retain_graph=True)
    assert all(gradient.abs().max() > 0 for gradient in expected)
    for form, value in forms.items():
        scale = forms["tensorly"].abs().max().item()
        torch.testing.assert_close(value, forms["tensorly"], rtol=0, atol=1e-12 * scale, msg=form)
        found = torch.autograd.grad((value * weights).sum(), cores)
        for own, other in zip(found, expected, strict=True):
            torch.testing.assert_close(own, other, rtol=0, atol=1e-12 * other.abs().max().item(), msg=form)


def test_the_digits_of_a_position_choose_the_slices_of_the_cores():
    layout, cores = train(([2, 3], [4, 5]), rank=3)
    matrix = reconstruct(cores, layout)
    for i1, i2, j1, j2 in [(0, 0, 0, 0), (1, 2, 3, 4), (1, 0, 2, 1)]:
        value = cores[0][:, i1] @ cores[1][:, i2] @ cores[2][:, j1] @ cores[3][:, j2]
        torch.testing.assert_close(matrix[j1 * 5 + j2, i2 * 2 + i1], value.squeeze())


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_update_has_at_most_the_rank_of_the_middle_bond(shape):
    layout, cores = train(shape)
    middle = layout.ranks(5)[len(layout.inputs)]
    assert middle == min(5, math.prod(layout.inputs), math.prod(layout.outputs))
    a, b = fold(cores, layout)
    assert a.shape == (middle, math.prod(layout.inputs)) and b.shape == (math.prod(layout.outputs), middle)


def test_ranks_are_clipped_to_what_the_modes_can_fill():
    assert Layout((2, 3, 2), (2, 5)).ranks(5) == (1, 2, 5, 5, 5, 1)
    assert Layout((2, 3, 2), (2, 2)).ranks(5) == (1, 2, 5, 4, 2, 1)
    with pytest.raises(ValueError, match="^rank: 0 is below 1$"):
        Layout((4,), (4,)).ranks(0)


def test_stacked_trains_fold_and_reconstruct_each_as_alone():
    layout = Layout((4, 2), (3, 2))
    generator = torch.Generator().manual_seed(0)
    stacked = [torch.randn(3, *shape, generator=generator) for shape in layout.shapes(3)]
    a, b = fold(stacked, layout)
    dense = reconstruct(stacked, layout)
    for expert in range(3):
        own = [core[expert] for core in stacked]
        torch.testing.assert_close(b[expert] @ a[expert], reconstruct(own, layout))
        torch.testing.assert_close(dense[expert], reconstruct(own, layout))


@pytest.mark.parametrize(
    "size", [1, 2, 7, 13, 17, 97, 384, 576, 768, 1000, 1536, 2048, 3063, 4096, 11008, 30522, 49152]
)
def test_balanced_modes_multiply_to_any_size_and_stay_small_where_its_primes_allow(size):
    modes = balanced_modes(size)
    assert math.prod(modes) == size and list(modes) == sorted(modes)
    largest_prime = max((p for p in range(2, size + 1) if size % p == 0 and all(p % d for d in range(2, p))), default=1)
    assert max(modes) <= max(16, largest_prime)
    assert 1 not in modes or size == 1


def test_given_modes_must_multiply_to_the_size_of_the_linear():
    assert layout_of(12, 10, [[3, 4], [5, 2]]) == Layout((3, 4), (5, 2))
    with pytest.raises(ValueError, match=r"^shapes: the input modes \[3, 5\] multiply to 15, but .* 12 input features"):
        layout_of(12, 10, [[3, 5], [5, 2]])
    with pytest.raises(ValueError, match=r"^shapes: the output modes \[\] "):
        layout_of(12, 10, [[3, 4], []])
    with pytest.raises(ValueError, match="must be two lists"):
        layout_of(12, 10, [[3, 4, 5, 2]])


def test_the_official_start_has_unit_cores_and_the_published_size():
    torch.manual_seed(0)
    factors = TensorTrainFactors(layout_of(2048, 2048, SHAPES["llama3.2-1b q"]), 5, "official", experts=20)
    for core in factors.cores:
        torch.testing.assert_close(torch.linalg.vector_norm(core, dim=(1, 2, 3)), torch.ones(20), rtol=0, atol=1e-4)
    a, b = factors(torch.arange(20))
    norm = torch.linalg.matrix_norm(b @ a).mean().item()
    assert norm == pytest.approx(0.0034, rel=0.1)  # 20 draws of the official start: 0.0034


def test_the_zero_start_is_exactly_zero_and_still_learns():
    torch.manual_seed(0)
    factors = TensorTrainFactors(layout_of(2048, 512, SHAPES["llama3.2-1b v"]), 5)
    a, b = factors()
    assert b.abs().max() == 0
    assert a.var().item() == pytest.approx(1 / (3 * 2048), rel=0.1)
    ((torch.randn(4, 2048) @ a.mT @ b.mT) * torch.randn(4, 512)).sum().backward()
    gradients = [core.grad.abs().max().item() for core in factors.cores]
    assert gradients[-1] > 0 and max(gradients[:-1]) == 0


def test_a_first_step_of_the_last_core_moves_b_like_a_step_of_a_lora():
    torch.manual_seed(0)
    factors = TensorTrainFactors(layout_of(2048, 2048), 5)
    with torch.no_grad():
        factors.cores[-1].copy_(1e-3 * torch.randn(factors.cores[-1].shape).sign())  # Adam's first step, rate 1e-3
    assert factors()[1].std().item() == pytest.approx(1e-3, rel=0.3)


@pytest.mark.parametrize("init", ["zero", "official"])
def test_experts_and_layers_start_differently_and_a_seed_repeats_them(init):
    def cores(seed):
        torch.manual_seed(seed)
        return [TensorTrainFactors(Layout((4, 2), (3, 2)), 2, init, experts=2).cores for _ in range(2)]

    first, second = cores(0)
    assert not torch.equal(first[0][0], first[0][1]) and not torch.equal(first[0], second[0])
    assert all(torch.equal(one, other) for one, other in zip(first, cores(0)[0], strict=True))


def test_chosen_experts_come_in_the_order_of_the_rows():
    torch.manual_seed(0)
    factors = TensorTrainFactors(Layout((4, 2), (3, 2)), 2, "official", experts=3)
    a, b = factors(torch.tensor([2, 0, 2]))
    whole_a, whole_b = factors()
    assert a.shape == (3, 2, 8) and b.shape == (3, 6, 2)
    torch.testing.assert_close(a, whole_a[[2, 0, 2]])
    torch.testing.assert_close(b, whole_b[[2, 0, 2]])


def test_an_unknown_start_is_refused():
    with pytest.raises(ValueError, match="^init: 'ones' is unknown; use zero or official$"):
        TensorTrainFactors(Layout((4,), (4,)), 2, "ones")
