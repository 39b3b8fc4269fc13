"""The gated low-rank update in its three steps against the reference and a plain einsum, forward and backward."""

import pytest
import torch

from moe_peft.context import RoutingContext
from moe_peft.kernels.dispatch import expand, shrink
from moe_peft.kernels.reference import apply_core, low_rank_update
from moe_peft.layers.adapted import AdaptedLinear
from moe_peft.layers.factors import DenseFactors
from moe_peft.layers.nested_experts import nested_experts
from moe_peft.layers.rank_selector import RankSelector
from moe_peft.layers.routers import JointRouter

BATCH, SEQUENCE, INPUTS, OUTPUTS, R, Q = 2, 5, 7, 6, 3, 4
FORMS = ["identity", "diagonal", "matrix"]
SCALE = 1.7


def operands(form, dtype=torch.float64, seed=0):
    """Returns y, x, A, B and the core of one form, every one a leaf that needs a gradient (the core may be None)."""
    torch.manual_seed(seed)
    q = Q if form == "matrix" else R
    core = {"identity": None, "diagonal": (BATCH, SEQUENCE, R), "matrix": (BATCH, SEQUENCE, Q, R)}[form]
    shapes = [(BATCH, SEQUENCE, OUTPUTS), (BATCH, SEQUENCE, INPUTS), (R, INPUTS), (OUTPUTS, q), core]
    return [None if shape is None else torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def staged(y, x, a, b, core):
    """The three steps of the dispatch; `* 1` gives it a fresh y, as a base linear does."""
    return expand(y * 1, apply_core(shrink(x, a), core), b, SCALE)


def by_einsum(y, x, a, b, core):
    if core is None:
        core = torch.eye(R, dtype=x.dtype).expand(BATCH, SEQUENCE, R, R)
    elif core.dim() == 3:
        core = torch.diag_embed(core)
    return y + SCALE * torch.einsum("oq,bsqr,rd,bsd->bso", b, core, a, x)


def gradients(update, tensors):
    leaves = [tensor for tensor in tensors if tensor is not None]
    result = update(*tensors)
    torch.manual_seed(9)
    return result, torch.autograd.grad(result, leaves, torch.randn(result.shape, dtype=result.dtype))


def agree(one, other):
    torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("update", [staged, lambda *t: low_rank_update(*t, scale=SCALE)], ids=["staged", "reference"])
def test_values_and_gradients_equal_the_einsum(form, update):
    tensors = operands(form)
    found, expected = gradients(update, tensors), gradients(by_einsum, tensors)
    assert (expected[0] - tensors[0]).abs().max() > 0.1
    agree(found[0], expected[0])
    for one, other in zip(found[1], expected[1], strict=True):
        assert other.abs().max() > 0.01
        agree(one, other)


@pytest.mark.parametrize("form", FORMS)
def test_every_gradient_equals_finite_differences(form):
    tensors = operands(form)
    assert torch.autograd.gradcheck(staged, tensors)


@pytest.mark.parametrize("form", ["diagonal", "matrix"])
@pytest.mark.parametrize("lead", [(1, SEQUENCE), (BATCH, 1), (1, 1)])
def test_a_core_broadcasts_over_rows_and_tokens(form, lead):
    y, x, a, b, core = operands(form)
    small = core[: lead[0], : lead[1]].detach().requires_grad_()
    whole = small.expand_as(core)
    agree(staged(y, x, a, b, small), by_einsum(y, x, a, b, whole))
    assert torch.autograd.gradcheck(lambda core: staged(y, x, a, b, core), [small])


@pytest.mark.parametrize("form", FORMS)
def test_non_contiguous_inputs_change_nothing(form):
    tensors = operands(form)
    strided = [
        None if t is None else t.detach().transpose(0, -1).contiguous().transpose(0, -1).requires_grad_()
        for t in tensors
    ]
    assert not any(t.is_contiguous() for t in strided if t is not None)
    found, expected = gradients(staged, strided), gradients(by_einsum, tensors)
    agree(found[0], expected[0])
    for one, other in zip(found[1], expected[1], strict=True):
        agree(one, other)


def test_a_non_contiguous_y_is_left_as_it_was():
    _, x, a, b, _ = operands("identity")
    y = torch.randn(BATCH, OUTPUTS, SEQUENCE, dtype=torch.float64).mT
    before = y.clone()
    agree(expand(y, shrink(x, a), b, SCALE), by_einsum(before, x, a, b, None))
    assert torch.equal(y, before)


@pytest.mark.parametrize("grad", [True, False])
def test_y_is_written_in_place_in_eager_mode(grad):
    y, x, a, b, core = operands("matrix")
    with torch.set_grad_enabled(grad):
        fresh, expected = y * 1, by_einsum(y, x, a, b, core)
        result = expand(fresh, apply_core(shrink(x, a), core), b, SCALE)
    assert result.data_ptr() == fresh.data_ptr() and result.requires_grad == grad
    agree(result, expected)


def test_a_y_without_gradient_is_written_in_place_and_still_trains_the_factors():
    y, *rest = operands("matrix")
    fixed = y.detach().clone()
    result = expand(fixed, apply_core(shrink(rest[0], rest[1]), rest[3]), rest[2], SCALE)
    assert result.data_ptr() == fixed.data_ptr()
    found = torch.autograd.grad(result.pow(2).sum(), rest)
    expected = torch.autograd.grad(by_einsum(y.detach(), *rest).pow(2).sum(), rest)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_a_leaf_y_that_needs_a_gradient_is_not_overwritten():
    y, x, a, b, core = operands("matrix")
    before = y.detach().clone()
    agree(expand(y, apply_core(shrink(x, a), core), b, SCALE), by_einsum(before, x, a, b, core))
    assert torch.equal(y, before)


def test_the_result_has_the_dtype_of_y():
    y, x, a, b, core = operands("matrix", torch.float32)
    low = expand(y.bfloat16() * 1, apply_core(shrink(x.bfloat16(), a).float(), core), b, SCALE)
    assert low.dtype == torch.bfloat16
    expected = by_einsum(y, x, a, b, core)
    assert (low - expected).abs().max() < 0.03 * expected.abs().max()


def test_a_core_of_another_number_of_dimensions_is_refused():
    h = torch.randn(BATCH, SEQUENCE, R)
    with pytest.raises(ValueError, match="core has 5 dimensions, activations have 3"):
        apply_core(h, torch.randn(1, BATCH, SEQUENCE, Q, R))


def adapted(name, context):
    torch.manual_seed(0)
    base = torch.nn.Linear(INPUTS, OUTPUTS)
    if name == "lora":
        layer = AdaptedLinear(base, DenseFactors(INPUTS, OUTPUTS, R, R), None, SCALE, 0.0, context, "slot")
    elif name == "mor1e":
        router = JointRouter(INPUTS, R, R, rank1=True, clusters=R * Q)
        layer = AdaptedLinear(base, DenseFactors(INPUTS, OUTPUTS, R, R), router, 1.0, 0.0, context, "slot")
    elif name == "more":
        router = RankSelector(INPUTS, nested_experts(range(1, R + 1), R, BATCH, "none"), BATCH)
        layer = AdaptedLinear(base, DenseFactors(INPUTS, OUTPUTS, R, R), router, SCALE, 0.0, context, "slot")
    else:
        router = JointRouter(INPUTS, R, Q, clusters=R * Q)
        layer = AdaptedLinear(base, DenseFactors(INPUTS, OUTPUTS, R, Q), router, 1.0, 0.0, context, "slot")
    torch.nn.init.normal_(layer.factors.B)
    return layer


@pytest.mark.parametrize("name", ["lora", "trex", "mor1e", "more"])
def test_a_compiled_adapted_linear_equals_eager_without_a_graph_break(name):
    torch._dynamo.reset()
    context = RoutingContext()
    ids = torch.arange(BATCH * SEQUENCE).view(BATCH, SEQUENCE)
    key = context.begin(ids, torch.ones_like(ids))
    context.put("prior", torch.randn(BATCH, R * Q), key)
    context.put("task_id", torch.arange(BATCH), key)
    layer = adapted(name, context)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x, upstream = torch.randn(BATCH, SEQUENCE, INPUTS, requires_grad=True), torch.randn(BATCH, SEQUENCE, OUTPUTS)
    trained = [p for p in layer.parameters() if p.requires_grad]
    results = [(run(x), run) for run in (layer, compiled)]
    assert (results[0][0] - layer.base(x)).abs().max() > 0.1
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-5, atol=1e-5)
    eager, traced = (torch.autograd.grad(result, [x, *trained], upstream) for result, _ in results)
    for one, other in zip(traced, eager, strict=True):
        assert other.abs().max() > 0
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(compiled.eval()(x), layer.eval()(x), rtol=1e-5, atol=1e-5)


def test_a_compiled_layer_reads_the_facts_of_the_batch_in_hand():
    torch._dynamo.reset()
    context = RoutingContext()
    layer = adapted("trex", context)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(BATCH, SEQUENCE, INPUTS)
    outputs = []
    for seed in range(2):
        ids = torch.arange(BATCH * SEQUENCE).view(BATCH, SEQUENCE) + seed
        torch.manual_seed(seed)
        context.put("prior", torch.randn(BATCH, R * Q), context.begin(ids, torch.ones_like(ids)))
        outputs.append(compiled(x))
        torch.testing.assert_close(outputs[-1], layer(x), rtol=1e-5, atol=1e-5)
    assert (outputs[0] - outputs[1]).abs().max() > 0.01
