"""The Triton kernels in the interpreter against the specification in fp64 and autograd: values and every gradient.

The interpreter runs programs one after another and stores bf16 truncated: it sees wrong formulas, masks and indices, no
races and no rounding of a GPU.
"""

from typing import NamedTuple

import pytest
import torch
import triton
import triton.language as tl

from moe_peft.kernels import gpu
from moe_peft.kernels.eager import Plan
from moe_peft.kernels.gated import gated_update
from moe_peft.kernels.gpu import backward_input, backward_output, forward, gates
from moe_peft.kernels.gpu.dropout import kept as truly_kept
from moe_peft.kernels.reference import Gate, apply_gate, gate_weights
from moe_peft.kernels.reference import gated_update as specification

SCALE = 1.7


class Case(NamedTuple):
    form: str
    ranks: int
    experts: int = 0
    outputs: int = 0
    scores: bool = False
    beta: str = ""
    by_row: bool = False
    rows: int = 3
    tokens: int = 19
    inputs: int = 70
    width: int = 131


CASES = {
    "lora": Case("identity", 5),
    "rank 1": Case("identity", 1),
    "rank 33": Case("identity", 33),
    "rank 70": Case("identity", 70),
    "rank 40, sum in parts": Case("identity", 40, rows=2, tokens=9, inputs=260),
    "lora by row": Case("identity", 5, by_row=True),
    "rank 40 by row, sum in parts": Case("identity", 40, by_row=True, rows=2, tokens=9, inputs=260),
    "more": Case("diagonal", 7, 7, beta="row"),
    "mor1e": Case("diagonal", 5, 5, scores=True, beta="row"),
    "mor1e without prior": Case("diagonal", 6, 6, scores=True),
    "mor1e of one expert": Case("diagonal", 1, 1, scores=True, beta="all"),
    "mor1e of 70 experts": Case("diagonal", 70, 70, scores=True, beta="token"),
    "one weight for each row": Case("block", 5, 1, beta="row", by_row=True),
    "lora experts": Case("block", 15, 5, scores=True, beta="token"),
    "lora experts by row": Case("block", 6, 2, scores=True, beta="row", by_row=True),
    "lora experts beyond a tile": Case("block", 36, 9, scores=True),
    "lora experts, sum in parts": Case("block", 6, 3, scores=True, beta="row", inputs=260),
    "t-rex 3x5": Case("matrix", 3, 15, 5, scores=True, beta="row"),
    "t-rex 4x8 without prior": Case("matrix", 4, 32, 8, scores=True),
    "t-rex 5x3, weights of tokens": Case("matrix", 5, 15, 3, scores=True, beta="token"),
    "t-rex 8x8": Case("matrix", 8, 64, 8, scores=True, beta="row"),
    "t-rex 1x4": Case("matrix", 1, 4, 4, scores=True, beta="all"),
    "t-rex 4x1": Case("matrix", 4, 4, 1, scores=True, beta="all"),
    "given matrix": Case("matrix", 3, 6, 2, beta="token"),
    "one token": Case("matrix", 3, 6, 2, scores=True, beta="row", rows=1, tokens=1),
}
SOME = ["lora by row", "mor1e", "lora experts", "t-rex 3x5", "t-rex 8x8"]


def operands(case, dtype=torch.float64, seed=0):
    """Returns y, x, A, B, rows, α and β (None where a case has none), all of a size that keeps the gate sensitive."""
    torch.manual_seed(seed)
    lead, own = (case.rows, case.tokens), (case.rows,) if case.by_row else ()
    outputs, per = case.outputs or case.ranks, {"row": (case.rows, 1), "token": lead, "all": (1, 1)}
    shapes = [
        (*lead, case.width),
        (*lead, case.inputs),
        (*own, case.ranks, case.inputs),
        (*own, case.width, outputs),
        (case.experts, case.inputs) if case.scores else None,
        (1,) if case.scores else None,
        (*per[case.beta], case.experts) if case.beta else None,
    ]
    sizes = [1, 1, case.inputs**-0.5, 1, case.inputs**-0.5, 1, 1]
    made = [None if s is None else torch.randn(s, dtype=torch.float64) * size for s, size in zip(shapes, sizes)]  # noqa: B905
    kinds = [dtype] * 5 + [torch.promote_types(dtype, torch.float32)] * 2
    return [None if t is None else t.to(kind).requires_grad_() for t, kind in zip(made, kinds, strict=True)]


def by_kernels(case, dropout=0.0):
    def update(y, x, a, b, rows, alpha, beta):
        return gated_update(y * 1, x, a, b, Gate(case.form, rows, alpha, beta), SCALE, dropout, "triton")

    return update


def by_specification(case):
    def update(y, x, a, b, rows, alpha, beta):
        return specification(y, x, a, b, Gate(case.form, rows, alpha, beta), SCALE)

    return update


def gradients(update, given):
    """Returns the result, and the gradient of every operand there is."""
    result = update(*given)
    upstream = torch.randn(result.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    return [result, *torch.autograd.grad(result, [t for t in given if t is not None], upstream.to(result.dtype))]


def agree(found, expected, tolerance=1e-10, zeros=0):
    """Compares relative to the largest element; `zeros` is how many of the tensors ought to be zero."""
    sizes = [other.detach().abs().max().item() for other in expected]
    assert sum(size < 1e-3 for size in sizes) == zeros
    for one, other, size in zip(found, expected, sizes, strict=True):
        torch.testing.assert_close(one.double(), other.double(), rtol=0, atol=tolerance * max(size, 1e-3))


def compare(case, tolerance=1e-10):
    given = operands(case)
    constant_softmax = case.scores and case.experts == 1
    agree(gradients(by_kernels(case), given), gradients(by_specification(case), given), tolerance, constant_softmax)


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_equal_the_specification(name):
    compare(CASES[name])


@pytest.mark.parametrize("name", SOME)
def test_every_gradient_equals_finite_differences(name):
    case = CASES[name]._replace(rows=2, tokens=3, inputs=9, width=7)
    assert torch.autograd.gradcheck(by_kernels(case), operands(case), fast_mode=True)


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=str)
def test_lower_precision_is_close(name, dtype, tolerance):
    given = operands(CASES[name], dtype)
    exact = [None if t is None else t.detach().double().requires_grad_() for t in given]
    found = gradients(by_kernels(CASES[name]), given)
    assert [t.dtype for t in found] == [given[0].dtype, *(t.dtype for t in given if t is not None)]
    agree(found, gradients(by_specification(CASES[name]), exact), tolerance)


@pytest.mark.parametrize("name", ["lora by row", "t-rex 8x8"])
def test_a_second_run_gives_the_same_bits(name):
    runs = []
    for _ in range(2):
        torch.manual_seed(5)
        given = operands(CASES[name])
        runs.append(gradients(by_kernels(CASES[name], 0.3), given))
    assert all(map(torch.equal, *runs))


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_what_x_has_as_a_gradient_already_is_added_to_in_place(dropout):
    torch.manual_seed(0)
    plan, w, dz, dx = Plan("matrix", 3, 1, SCALE, dropout), torch.randn(9, 70), torch.randn(57, 9), torch.randn(57, 70)
    seed = gpu.draw(dx, plan)
    expected = gpu.backward_x(dz, w, None, plan, seed) + dx
    found = gpu.backward_x(dz, w, dx, plan, seed)
    assert found.data_ptr() == dx.data_ptr()
    agree([found], [expected], 1e-6)


@pytest.mark.parametrize("form", ["identity", "diagonal"])
def test_a_batch_of_no_tokens_has_gradients_of_zero(form):
    case = Case(form, 5, 5, beta="" if form == "identity" else "token", tokens=0)
    given = [None if t is None else t.detach().requires_grad_() for t in operands(case)]
    result = by_kernels(case)(*given)
    found = torch.autograd.grad(result, [t for t in given if t is not None], torch.ones_like(result))
    assert result.shape == (3, 0, 131) and not any(t.count_nonzero() for t in found)


def mask_of(seed, tokens, inputs, dropout):
    """Reads what is kept off the product of ones with a unit matrix."""
    ones, unit = torch.ones(tokens, inputs, dtype=torch.bfloat16), torch.eye(inputs, dtype=torch.bfloat16)
    o = gpu.shrink_gate(ones, unit, Plan("identity", inputs, 1, 1.0, dropout), None, None, seed)[1]
    kept = o != 0
    torch.testing.assert_close(o.double(), kept.double() / (1 - dropout), rtol=1e-2, atol=0)
    return kept


@pytest.mark.parametrize("name", [*SOME, "lora", "rank 40, sum in parts"])
def test_dropout_hides_from_a_what_it_hides_from_its_gradients_and_from_the_scores_nothing(name, monkeypatch):
    case, dropout, seed = CASES[name], 0.4, torch.tensor([2**40 + 17])
    monkeypatch.setattr(gpu, "draw", lambda x, plan: seed)
    given = operands(case)
    kept = mask_of(seed, case.rows * case.tokens, case.inputs, dropout).view(given[1].shape)

    def plain(y, x, a, b, rows, alpha, beta):
        h = (x * kept / (1 - dropout)) @ a.mT
        if case.form != "identity":
            h = apply_gate(h, gate_weights(None if rows is None else x @ rows.mT, alpha, beta), case.form)
        return y + SCALE * h @ b.mT

    agree(gradients(by_kernels(case, dropout), given), gradients(plain, given))


def test_dropout_drops_its_share_and_every_seed_another_one():
    masks = [mask_of(torch.tensor([seed]), 300, 96, 0.1) for seed in (0, 1, 2**32)]
    for mask in masks:
        assert abs(mask.double().mean() - 0.9) < 0.01
        assert abs(mask.double().mean(0) - 0.9).max() < 0.09 and abs(mask.double().mean(1) - 0.9).max() < 0.16
    for one, other in [(0, 1), (0, 2), (1, 2)]:
        assert abs((masks[one] == masks[other]).double().mean() - 0.82) < 0.01


def test_drawing_follows_the_seed_of_torch():
    plan, x = Plan("identity", 2, 1, 1.0, 0.1), torch.ones(2)
    torch.manual_seed(3)
    seeds = [gpu.draw(x, plan) for _ in range(2)]
    torch.manual_seed(3)
    assert torch.equal(seeds[0], gpu.draw(x, plan)) and not torch.equal(*seeds)
    assert gpu.draw(x, plan._replace(dropout=0.0)) is None


def test_more_pairs_than_a_program_holds_are_refused():
    with pytest.raises(ValueError, match=r"form 'matrix' with R=64 and E=8192 has 8192 .* use fewer experts"):
        gates.pairs("matrix", 64, 8192)


@triton.jit
def no_gate(h, g, MATRIX: tl.constexpr, ROWS: tl.constexpr, BI: tl.constexpr, BJ: tl.constexpr):
    return h


@triton.jit
def softmax_over_padding(scores, valid, counted):
    weights = tl.exp(scores - tl.max(scores, 1)[:, None])
    return weights / tl.sum(weights, 1)[:, None]


@triton.jit
def softmax_backward_without_sum(p, dp, counted):
    return p * dp


@triton.jit
def first_row_of_beta(token, every):
    return token * 0


@triton.jit
def load_with_ones_outside(pointer, row, there, column, width, OPERAND: tl.constexpr):
    mask = there[:, None] & (column < width)[None, :]
    return tl.load(pointer + row[:, None] * width + column[None, :], mask, other=1.0).to(OPERAND)


@triton.jit
def sum_over_the_other_axis(values, OVER_I: tl.constexpr, ROWS: tl.constexpr, BI: tl.constexpr, BJ: tl.constexpr):
    sums = tl.sum(values.reshape([ROWS, BI, BJ]), 2 if OVER_I else 1, keep_dims=True)
    return tl.broadcast_to(sums, [ROWS, BI, BJ]).reshape([ROWS, BI * BJ])


@triton.jit
def kept_by_the_next_seed(seed, tokens, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DROPOUT: tl.constexpr):
    return truly_kept(seed + 1, tokens, column, ROWS, COLUMNS, DROPOUT)


BUGS = {
    "no gate": (no_gate, "core", [forward], "mor1e"),
    "padding in the softmax": (softmax_over_padding, "softmax", [forward, backward_output], "t-rex 3x5"),
    "softmax backward without its sum": (softmax_backward_without_sum, "softmax_backward", [backward_output], "mor1e"),
    "another row's beta": (first_row_of_beta, "beta_row", [gates], "more"),
    "x beyond its width": (load_with_ones_outside, "load", [forward], "lora"),
    "tokens beyond the last": (load_with_ones_outside, "load", [backward_output], "lora by row"),
    "sum over the wrong axis": (sum_over_the_other_axis, "total", [gates], "t-rex 3x5"),
}


@pytest.mark.parametrize("bug", BUGS)
def test_the_comparison_catches(bug, monkeypatch):
    broken, name, modules, case = BUGS[bug]
    compare(CASES[case])
    for module in modules:
        monkeypatch.setattr(module, name, broken)
    with pytest.raises(AssertionError):
        compare(CASES[case], 1e-3)


def test_the_comparison_catches_another_mask_in_backward(monkeypatch):
    monkeypatch.setattr(backward_input, "kept", kept_by_the_next_seed)
    with pytest.raises(AssertionError, match="Mismatched elements"):
        test_dropout_hides_from_a_what_it_hides_from_its_gradients_and_from_the_scores_nothing("lora", monkeypatch)
