"""Compression of an update into a tensor train: TensorLy's TT-SVD of the dense matrix, without the dense matrix."""

import pytest
import tensorly
import torch
from tensorly.decomposition import tensor_train

from moe_peft.layers.compression import compress, relative_error
from moe_peft.layers.tensor_train import Layout, fold, layout_of, reconstruct

LAYOUT = layout_of(512, 256)


def low_rank(rank, seed=0, spectrum=None):
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(rank, 512, generator=generator, dtype=torch.float64)
    b = torch.randn(256, rank, generator=generator, dtype=torch.float64)
    return a, b * (torch.ones(rank) if spectrum is None else spectrum)


def tt_svd_error(dense, layout, rank):
    """The relative error of TensorLy's TT-SVD of the whole tensor."""
    q, d = len(layout.outputs), len(layout.modes)
    tensor = dense.reshape(*layout.outputs, *reversed(layout.inputs)).permute(*reversed(range(q, d)), *range(q))
    with tensorly.backend_context("pytorch"):  # pyright: ignore[reportAttributeAccessIssue]
        rebuilt = tensorly.tt_to_tensor(tensor_train(tensor, list(layout.ranks(rank))))
    return ((rebuilt - tensor).norm() / tensor.norm()).item()


@pytest.mark.parametrize("rank", [1, 2, 5, 16])
@pytest.mark.parametrize("spectrum", [None, torch.logspace(0, -2, 16, dtype=torch.float64)], ids=["flat", "decaying"])
def test_the_error_is_that_of_tt_svd_on_the_dense_matrix(rank, spectrum):
    a, b = low_rank(16, spectrum=spectrum)
    cores, error = compress(a, b, LAYOUT, rank)
    dense = b @ a
    rebuilt = reconstruct(cores, LAYOUT)
    assert error == pytest.approx(((rebuilt - dense).norm() / dense.norm()).item(), abs=1e-9)
    assert error == pytest.approx(tt_svd_error(dense, LAYOUT, rank), abs=1e-9)
    assert error > 0.05


def test_a_planted_train_is_recovered():
    generator = torch.Generator().manual_seed(0)
    planted = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in LAYOUT.shapes(5)]
    cores, error = compress(*fold(planted, LAYOUT), LAYOUT, 5)
    dense = reconstruct(planted, LAYOUT)
    assert error < 1e-7
    torch.testing.assert_close(reconstruct(cores, LAYOUT), dense, rtol=0, atol=1e-12 * dense.abs().max().item())


@pytest.mark.parametrize("layout", [Layout((12,), (10,)), Layout((3, 4), (10,)), Layout((12,), (2, 5))])
def test_short_trains_and_updates_of_a_lower_rank_fill_the_layouts_shapes(layout):
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 12, generator=generator), torch.randn(10, 2, generator=generator)
    cores, error = compress(a, b, layout, 10)
    assert [tuple(core.shape) for core in cores] == layout.shapes(10) and cores[0].dtype == torch.float32
    torch.testing.assert_close(reconstruct(cores, layout), b @ a, rtol=0, atol=1e-5)
    assert error < 1e-6


def test_a_zero_update_stays_zero():
    cores, error = compress(torch.ones(2, 512), torch.zeros(256, 2), LAYOUT, 3)
    assert error == 0 and reconstruct(cores, LAYOUT).abs().max() == 0


def test_the_error_needs_no_dense_matrix_and_is_exact():
    (a, b), (a2, b2) = low_rank(4), low_rank(3, seed=1)
    expected = ((b2 @ a2 - b @ a).norm() / (b @ a).norm()).item()
    assert relative_error(a2, b2, a, b) == pytest.approx(expected, rel=1e-12)


def test_values_that_are_not_finite_are_refused():
    a, b = low_rank(2)
    a[0, 0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        compress(a, b, LAYOUT, 3)


def test_the_global_backend_stays_what_it_was():
    before = tensorly.get_backend()
    compress(*low_rank(2), LAYOUT, 3)
    assert tensorly.get_backend() == before
