"""The gated operation against its specification: every form of gate, values and gradients, eager and compiled."""

import pytest
import torch
from torch import nn

from moe_peft.kernels.gated import gated_inference, gated_linear, gated_update
from moe_peft.kernels.operands import flat, prepare
from moe_peft.kernels.reference import Gate
from moe_peft.kernels.reference import gated_update as reference

BATCH, SEQUENCE, INPUTS, OUTPUTS = 3, 5, 7, 6
SCALE = 1.7
# name: form, R, Q, E, scored, shape of beta before E (None: no beta)
GATES = {
    "identity": ("identity", 3, 3, 0, False, None),
    "row": ("diagonal", 3, 3, 3, False, (BATCH, 1)),
    "token": ("diagonal", 3, 3, 3, False, (BATCH, SEQUENCE)),
    "position": ("diagonal", 3, 3, 3, False, (1, SEQUENCE)),
    "constant": ("diagonal", 3, 3, 3, False, (1, 1)),
    "scored_diagonal": ("diagonal", 3, 3, 3, True, (BATCH, 1)),
    "weight": ("block", 4, 4, 1, False, (BATCH, 1)),
    "block": ("block", 6, 6, 3, True, None),
    "block_prior": ("block", 6, 6, 3, True, (BATCH, 1)),
    "matrix": ("matrix", 2, 4, 8, True, (BATCH, 1)),
    "matrix_alone": ("matrix", 4, 2, 8, True, None),
    "matrix_given": ("matrix", 2, 4, 8, False, (BATCH, SEQUENCE)),
    "one_pair": ("matrix", 1, 1, 1, False, (BATCH, 1)),
}
EVERY = pytest.mark.parametrize("name", GATES)
BY_ROW = pytest.mark.parametrize("by_row", [False, True], ids=["shared", "by_row"])


def operands(name, by_row=False, dtype=torch.float64, seed=0):
    """Returns the base and leaves that need a gradient: x, A, B, W_r, α, β (None where the gate has none)."""
    form, r, q, e, scored, lead = GATES[name]
    torch.manual_seed(seed)
    group = (BATCH,) if by_row else ()
    shapes = [(BATCH, SEQUENCE, INPUTS), (*group, r, INPUTS), (*group, OUTPUTS, q)]
    shapes += [(e, INPUTS) if scored else None, (1,) if scored else None, None if lead is None else (*lead, e)]
    leaves = [None if s is None else torch.randn(s, dtype=dtype).requires_grad_() for s in shapes]
    return nn.Linear(INPUTS, OUTPUTS, dtype=dtype).requires_grad_(False), leaves


def run(update, name, base, leaves):
    x, a, b, rows, alpha, beta = leaves
    return update(x, base, a, b, Gate(GATES[name][0], rows, alpha, beta))


def ours(x, base, a, b, gate):
    return gated_linear(x, base, a, b, gate, SCALE)


def onto_output(x, base, a, b, gate):
    """The base's output is there already; `* 1` makes it no leaf."""
    return gated_update(base(x) * 1, x, a, b, gate, SCALE)


def plain(x, base, a, b, gate):
    return reference(base(x), x, a, b, gate, SCALE)


def gradients(update, name, base, leaves):
    y = run(update, name, base, leaves)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(y.dtype)
    return [y, *torch.autograd.grad(y, [leaf for leaf in leaves if leaf is not None], upstream)]


def agree(found, expected, tolerance=1e-12):
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape and other.abs().max() > 1e-3
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def alone(a, b, index):
    return a if a.dim() == 2 else a[index], b if b.dim() == 2 else b[index]


def token_by_token(x, base, a, b, gate):
    """The formula as it is written, for one token after the other, with the core as a matrix."""
    result = base(x).detach().clone()
    for row in range(BATCH):
        factor_a, factor_b = alone(a, b, row)
        for token in range(SEQUENCE):
            v, core = x[row, token], torch.eye(len(factor_a), dtype=x.dtype)
            g = 0 if gate.beta is None else gate.beta.expand(BATCH, SEQUENCE, -1)[row, token]
            if gate.rows is not None:
                scores = (gate.rows @ v).exp()
                g = g + gate.alpha * scores / scores.sum()
            if gate.form == "diagonal":
                core = torch.diag(g)
            elif gate.form == "block":
                core = torch.diag(g.repeat_interleave(len(factor_a) // len(g)))
            elif gate.form == "matrix":
                core = g.view(len(factor_a), -1).T
            result[row, token] += SCALE * factor_b @ core @ factor_a @ v
    return result


@EVERY
@BY_ROW
def test_the_specification_is_the_written_formula(name, by_row):
    base, leaves = operands(name, by_row)
    with torch.no_grad():
        y, expected = run(plain, name, base, leaves), run(token_by_token, name, base, leaves)
        assert (y - base(leaves[0])).abs().max() > 0.1
        agree([y], [expected])


@EVERY
@BY_ROW
@pytest.mark.parametrize("update", [ours, onto_output])
def test_values_and_gradients_equal_the_specification(name, by_row, update):
    base, leaves = operands(name, by_row)
    agree(gradients(update, name, base, leaves), gradients(plain, name, base, leaves))


@EVERY
@BY_ROW
def test_every_gradient_equals_finite_differences(name, by_row):
    base, leaves = operands(name, by_row)
    given = [leaf for leaf in leaves if leaf is not None]

    def function(*tensors):
        rest = iter(tensors)
        return run(ours, name, base, [None if leaf is None else next(rest) for leaf in leaves])

    assert torch.autograd.gradcheck(function, given)


@EVERY
@BY_ROW
def test_inference_on_ready_factors_is_the_same(name, by_row):
    base, leaves = operands(name, by_row)
    x, a, b, rows, alpha, beta = leaves
    with torch.no_grad():
        ready = prepare(x, a, b, Gate(GATES[name][0], rows, alpha, beta), SCALE, x.dtype)
        agree([gated_inference(x, base, ready)], [run(plain, name, base, leaves)])


@EVERY
@BY_ROW
def test_compiled_whole_forward_and_backward_are_the_same(name, by_row):
    torch._dynamo.reset()
    base, leaves = operands(name, by_row)
    compiled = torch.compile(lambda *given: run(ours, name, base, given), fullgraph=True, backend="aot_eager")
    agree(
        gradients(lambda x, base, a, b, gate: compiled(x, a, b, *gate[1:]), name, base, leaves),
        gradients(plain, name, base, leaves),
    )


@pytest.mark.parametrize("name", ["identity", "row", "matrix", "block_prior"])
def test_a_half_precision_base_has_gates_and_their_gradients_in_fp32(name):
    base, exact = operands(name, dtype=torch.float32)
    low_base = nn.Linear(INPUTS, OUTPUTS).requires_grad_(False)
    low_base.load_state_dict(base.state_dict())
    low = [exact[0].detach().bfloat16().requires_grad_(), *exact[1:]]
    found, expected = gradients(ours, name, low_base.bfloat16(), low), gradients(plain, name, base, exact)
    assert [tensor.dtype for tensor in found] == [torch.bfloat16] * 2 + [torch.float32] * (len(found) - 2)
    for one, other in zip(found, expected, strict=True):
        assert 0 < (one - other).abs().max() < 0.03 * other.abs().max()


@pytest.mark.parametrize("name", ["identity", "row", "matrix", "block_prior"])
@pytest.mark.parametrize("many", [False, True])
@BY_ROW
def test_a_half_precision_base_serves_few_tokens_in_fp32_and_many_in_its_own_precision(name, many, by_row):
    base, leaves = operands(name, by_row, dtype=torch.float32)
    x, a, b, rows, alpha, beta = (leaf if leaf is None else leaf.detach() for leaf in leaves)
    x = (x.repeat(1, 40, 1) if many else x).bfloat16()
    gate, base = Gate(GATES[name][0], rows, alpha, beta), base.bfloat16()
    ready = prepare(x, a, b, gate, SCALE, base.weight.dtype)
    assert ready.w.dtype == ready.bt.dtype == (torch.bfloat16 if many else torch.float32)
    found, expected = gated_inference(x, base, ready), plain(x.float(), base.float(), a, b, gate)
    assert found.dtype == torch.bfloat16
    assert 0 < (found - expected).abs().max() < 0.03 * expected.abs().max()


@pytest.mark.parametrize("leaf", range(6))
def test_each_gradient_alone_is_the_same(leaf):
    """What needs no gradient is not computed, and that changes no other."""
    base, leaves = operands("matrix")
    expected = gradients(plain, "matrix", base, leaves)[1 + leaf]
    some = [one if at == leaf else one.detach() for at, one in enumerate(leaves)]
    for update in (ours, onto_output):
        y = run(update, "matrix", base, some)
        upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
        agree(torch.autograd.grad(y, some[leaf], upstream), [expected])


@pytest.mark.parametrize("name", ["identity", "matrix"])
@BY_ROW
def test_dropout_acts_on_the_input_of_a_alone_forward_and_backward(name, by_row):
    base, leaves = operands(name, by_row)
    x, a, b, rows, alpha, beta = leaves
    torch.manual_seed(3)
    found = gradients(lambda x, base, a, b, gate: gated_linear(x, base, a, b, gate, SCALE, 0.4), name, base, leaves)
    torch.manual_seed(3)
    kept = torch.empty_like(flat(x, a), dtype=torch.bool).bernoulli_(0.6).view_as(x)
    assert 0 < kept.sum() < kept.numel()

    def masked(x, base, a, b, gate):
        scores = Gate(gate.form, None, None, gate.beta)
        if gate.rows is not None:
            scores = scores._replace(beta=gate.alpha * (x @ gate.rows.mT).softmax(-1) + gate.beta)
        return reference(base(x), x * kept / 0.6, a, b, scores, SCALE)

    agree(found, gradients(masked, name, base, leaves))


def test_the_same_seed_drops_the_same_elements_as_torch_does():
    base, leaves = operands("identity")
    torch.manual_seed(3)
    found = run(lambda *given: gated_linear(*given, SCALE, 0.4), "identity", base, leaves)
    torch.manual_seed(3)
    x, a, b = leaves[:3]
    agree([found], [base(x) + SCALE * torch.dropout(x, 0.4, True) @ a.mT @ b.mT])


class Doubled(nn.Linear):
    """No plain linear."""

    def forward(self, input):
        return 2 * super().forward(input)


def test_a_base_that_is_no_plain_linear_is_called():
    base, leaves = operands("matrix")
    other = Doubled(INPUTS, OUTPUTS, dtype=torch.float64).requires_grad_(False)
    agree(gradients(ours, "matrix", other, leaves), gradients(plain, "matrix", other, leaves))
    hooked = gradients(ours, "matrix", base, leaves)
    base.register_forward_hook(lambda module, given, result: 3 * result)
    agree(gradients(ours, "matrix", base, leaves), gradients(plain, "matrix", base, leaves))
    assert not torch.equal(gradients(ours, "matrix", base, leaves)[0], hooked[0])


class Turned(nn.Linear):
    """Gives its output in another memory order."""

    def forward(self, input):
        return super().forward(input).transpose(0, -1).contiguous().transpose(0, -1)


def test_an_output_in_another_memory_order_is_updated_in_training_and_in_inference():
    base, leaves = operands("matrix")
    turned = Turned(INPUTS, OUTPUTS, dtype=torch.float64).requires_grad_(False)
    expected = run(plain, "matrix", turned, leaves)
    assert not turned(leaves[0]).is_contiguous()
    x, a, b, rows, alpha, beta = (leaf.detach() for leaf in leaves)
    ready = prepare(x, a, b, Gate("matrix", rows, alpha, beta), SCALE, x.dtype)
    with torch.no_grad():
        agree([run(ours, "matrix", turned, leaves), gated_inference(x, turned, ready)], [expected] * 2)


def test_a_backward_hook_on_the_base_is_called():
    base, leaves = operands("matrix")
    called = []
    base.register_full_backward_hook(lambda module, given, wanted: called.append(1))
    run(ours, "matrix", base, leaves).sum().backward()
    assert called


def test_autocast_takes_the_base_in_its_dtype_and_the_gate_in_fp32():
    base, leaves = operands("matrix", dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(ours, "matrix", base, leaves)
    expected = gradients(plain, "matrix", base, leaves)
    assert found[0].dtype == torch.bfloat16 and all(one.dtype == torch.float32 for one in found[1:])
    for one, other in zip(found, expected, strict=True):
        assert 0 < (one - other).abs().max() < 0.03 * other.abs().max()


@EVERY
def test_backward_keeps_x_itself_and_nothing_larger_than_rank_space_or_factors(name):
    base, leaves = operands(name)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        run(ours, name, base, leaves)
    own = {base.weight.data_ptr(), leaves[0].data_ptr()}
    rest = [tensor for tensor in kept if tensor.data_ptr() not in own]
    assert {tensor.data_ptr() for tensor in kept} > own
    _, r, q, e, *_ = GATES[name]
    tokens = BATCH * SEQUENCE
    largest = max((r + e) * tokens, q * tokens, (r + e) * INPUTS, q * OUTPUTS)
    assert rest and all(tensor.numel() <= largest for tensor in rest)


def test_the_second_derivative_is_refused_in_one_line():
    base, leaves = operands("identity")
    y = run(ours, "identity", base, leaves)
    (first,) = torch.autograd.grad(y.square().sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_no_product_of_the_base_with_a_gradient_of_its_weight_is_formed():
    base, leaves = operands("identity")
    y = run(ours, "identity", base.requires_grad_(True), leaves)
    with pytest.raises(RuntimeError, match="not have been used"):
        torch.autograd.grad(y.sum(), base.weight)


def test_a_batch_without_tokens_passes():
    base, (x, a, b, *_) = operands("identity")
    empty = x[:0].detach().requires_grad_()
    y = gated_linear(empty, base, a, b, Gate(), SCALE)
    y.sum().backward()
    assert y.shape == (0, SEQUENCE, OUTPUTS) and empty.grad is not None and a.grad.abs().max() == 0
