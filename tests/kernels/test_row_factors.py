"""The low-rank update where every row of a batch has factors of its own, against the plain formula, row by row."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from moe_peft.kernels.dispatch import expand, shrink

ROWS, INPUTS, OUTPUTS, R = 3, 7, 6, 2
SCALE = 1.7
LEADS = [(ROWS,), (ROWS, 5), (ROWS, 1), (ROWS, 2, 4), (1, 5)]


def operands(lead=(ROWS, 5), dtype=torch.float64, seed=0):
    """Returns y [..., O], x [..., D], A [B, R, D] and B [B, O, R], leaves that need a gradient."""
    torch.manual_seed(seed)
    shapes = [(*lead, OUTPUTS), (*lead, INPUTS), (lead[0], R, INPUTS), (lead[0], OUTPUTS, R)]
    return [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]


def staged(y, x, a, b):
    """The two steps of the dispatch; `* 1` gives it a fresh y, as a base linear does."""
    return expand(y * 1, shrink(x, a), b, SCALE)


def by_row(y, x, a, b):
    """y_b + s B_b A_b x_b for one row after the other."""
    return torch.stack([y[i] + SCALE * (x[i] @ (b[i] @ a[i]).mT) for i in range(len(x))])


def gradients(update, tensors):
    result = update(*tensors)
    upstream = torch.randn(result.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    return [result, *torch.autograd.grad(result, tensors, upstream.to(result.dtype))]


def agree(found, expected, tolerance=1e-12):
    for one, other in zip(found, expected, strict=True):
        assert other.abs().max() > 0.1
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance)


@pytest.mark.parametrize("lead", LEADS)
def test_values_and_gradients_equal_the_formula_row_by_row(lead):
    tensors = operands(lead)
    assert (by_row(*tensors) - tensors[0]).abs().max() > 0.1
    assert shrink(*tensors[1:3]).shape == (*lead, R)
    agree(gradients(staged, tensors), gradients(by_row, tensors))


@pytest.mark.parametrize("lead", LEADS)
def test_every_gradient_equals_finite_differences(lead):
    assert torch.autograd.gradcheck(staged, operands(lead))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_the_update_is_the_same_and_leaves_y_as_it_was(backend):
    torch._dynamo.reset()
    compiled = torch.compile(lambda y, x, a, b: expand(y, shrink(x, a), b, SCALE), fullgraph=True, backend=backend)
    tensors = operands()
    agree(gradients(compiled, tensors), gradients(by_row, tensors))
    fresh = tensors[0].detach() * 1
    result = compiled(fresh, *tensors[1:])
    assert torch.equal(fresh, tensors[0]) and not torch.equal(result, fresh)


@pytest.mark.parametrize("grad", [True, False])
def test_y_is_written_in_place_in_eager_mode(grad):
    y, x, a, b = operands()
    with torch.set_grad_enabled(grad):
        fresh = y * 1
        result = expand(fresh, shrink(x, a), b, SCALE)
    assert result.data_ptr() == fresh.data_ptr() and result.requires_grad == grad
    agree([result], [by_row(y, x, a, b)])


def test_a_leaf_y_that_needs_a_gradient_is_not_overwritten():
    y, x, a, b = operands()
    before = y.detach().clone()
    agree([expand(y, shrink(x, a), b, SCALE)], [by_row(before, x, a, b)])
    assert torch.equal(y, before)


def strided(tensor):
    """The same numbers in another memory order."""
    turned = tensor.detach().transpose(0, -1).contiguous().transpose(0, -1)
    assert not turned.is_contiguous()
    return turned.requires_grad_()


def test_non_contiguous_operands_change_nothing():
    tensors = operands()
    agree(gradients(staged, [strided(tensor) for tensor in tensors]), gradients(by_row, tensors))


def test_a_non_contiguous_y_is_left_as_it_was():
    y, x, a, b = operands()
    y = strided(y).detach()
    before = y.clone()
    agree([expand(y, shrink(x, a), b, SCALE)], [by_row(before, x, a, b)])
    assert torch.equal(y, before)


def test_bfloat16_is_close_to_fp32_and_factors_of_fp32_get_gradients_of_fp32():
    exact = operands(dtype=torch.float32)
    low = [tensor.detach().bfloat16().requires_grad_() for tensor in exact[:2]] + exact[2:]
    found, expected = gradients(staged, low), gradients(by_row, exact)
    assert shrink(low[1], low[2]).dtype == torch.bfloat16
    assert [tensor.dtype for tensor in found] == [torch.bfloat16] * 3 + [torch.float32] * 2
    for one, other in zip(found, expected, strict=True):
        assert 0 < (one - other).abs().max() < 0.02 * other.abs().max()


def test_factors_of_another_number_of_rows_are_refused():
    y, x, a, b = operands((4, 3))
    for form in ("eager", "compiled"):
        with pytest.raises(RuntimeError):
            shrink(x, a[:2])
        with pytest.raises(RuntimeError), pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.compiler, "is_compiling", lambda form=form: form == "compiled")
            expand(y.detach().clone(), shrink(x, a), b[:2], SCALE)


class Made(TorchDispatchMode):
    """Sizes of the tensors that operations make anew."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        given = {arg.untyped_storage().data_ptr() for arg in args if isinstance(arg, torch.Tensor)}
        for tensor in found if isinstance(found, tuple | list) else [found]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in given:
                self.shapes.append(tuple(tensor.shape))
        return found


def test_nothing_larger_than_rank_space_is_made_forward_and_nothing_larger_than_an_input_backward():
    y, x, a, b = operands()
    fresh, upstream = y * 1, torch.randn_like(y)
    with Made() as forward:
        result = expand(fresh, shrink(x, a), b, SCALE)
    assert forward.shapes and set(forward.shapes) == {(ROWS, 5, R)}
    with Made() as backward:
        torch.autograd.grad(result, [x, a, b], upstream)
    assert set(backward.shapes) == {(ROWS, 5, R), x.shape, a.shape, b.shape, b.mT.shape}


def test_frozen_factors_cost_no_gradient_of_theirs():
    y, x, a, b = operands()
    result, upstream = expand(y * 1, shrink(x, a.detach()), b.detach(), SCALE), torch.randn_like(y)
    with Made() as backward:
        found = torch.autograd.grad(result, x, upstream)
    agree(found, torch.autograd.grad(by_row(y, x, a, b), x, upstream))
    assert set(backward.shapes) == {(ROWS, 5, R), x.shape}
