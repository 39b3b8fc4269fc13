"""A linear with a bank of experts: every row gets its own expert, whatever else is in the batch."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from tests.layers.tiny_experts import OUT, SCALE, TOKENS, D, E, R, agree, begin, expected, experts, inputs

CHOSEN = [2, 0, 3, 2, 1, 0]


def run(layer, x, chosen, **facts):
    begin(layer.context, chosen, **facts)
    return layer(x)


def test_every_row_is_served_by_its_own_expert():
    layer, x = experts(), inputs(len(CHOSEN))
    found = run(layer, x, CHOSEN)
    agree(found, expected(layer, x, CHOSEN))
    others = [expected(layer, x, [expert] * len(CHOSEN)) for expert in range(E)]
    assert all((found - other).abs().amax((1, 2)).sort().values[-3] > 0.5 for other in others)


def test_the_order_of_rows_only_orders_the_outputs():
    layer, x, order = experts(), inputs(len(CHOSEN)), [4, 2, 0, 5, 1, 3]
    found = run(layer, x[order], [CHOSEN[row] for row in order])
    agree(found, run(layer, x, CHOSEN)[order])


def test_a_row_is_the_same_alone_and_among_others():
    layer, x = experts(), inputs(len(CHOSEN))
    together = run(layer, x, CHOSEN)
    for row, expert in enumerate(CHOSEN):
        agree(run(layer, x[row : row + 1], [expert])[0], together[row])


def test_an_expert_of_many_is_the_same_as_an_expert_of_one():
    layer, alone, x = experts(), experts(1), inputs(2)
    alone.base.load_state_dict(layer.base.state_dict())
    for core, own in zip(layer.factors.cores, alone.factors.cores, strict=True):
        own.data.copy_(core[2:3])
    agree(run(alone, x, [0, 0]), run(layer, x, [2, 2]))


def test_beams_lie_next_to_each_other():
    layer, x = experts(), inputs(6)
    begin(layer.context, [2, 0])
    agree(layer(x), expected(layer, x, [2, 2, 2, 0, 0, 0]))
    with pytest.raises(ValueError, match="2 rows, the layer sees 5"):
        layer(x[:5])


@pytest.mark.parametrize("shape", [(4, D), (4, 1, D), (4, 2, 3, D)])
def test_inputs_of_other_dimensions(shape):
    layer, chosen = experts(), [1, 3, 0, 2]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    agree(run(layer, x, chosen), expected(layer, x, chosen))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_null_expert_is_the_base_to_the_bit(dtype):
    layer, x, chosen = experts(dtype=dtype), inputs(4, dtype=dtype), [1, -1, 2, -1]
    found, base = run(layer, x, chosen), layer.base(x)
    assert torch.equal(found[[1, 3]], base[[1, 3]])
    assert (found[[0, 2]] - base[[0, 2]]).abs().max() > 0.5


def test_a_weight_scales_the_update_and_carries_a_gradient():
    layer, x = experts(), inputs(len(CHOSEN))
    weights = torch.tensor([0.5, 1.0, -2.0, 0.0, 3.0, 1.5], dtype=torch.float64, requires_grad=True)
    upstream = inputs(len(CHOSEN), seed=4) @ torch.randn(D, OUT, dtype=torch.float64)
    for tensors in ([weights], [weights, *layer.factors.cores]):
        results = [run(layer, x, CHOSEN, weight=weights), expected(layer, x, CHOSEN, weights)]
        agree(*results)
        found, other = (torch.autograd.grad((result * upstream).sum(), tensors) for result in results)
        for one, two in zip(found, other, strict=True):
            assert two.abs().max() > 1
            agree(one, two, 1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_of_one_changes_no_bit(dtype):
    layer, x = experts(dtype=dtype), inputs(len(CHOSEN), dtype=dtype)
    found = run(layer, x, CHOSEN, weight=torch.ones(len(CHOSEN)))
    assert torch.equal(found, run(layer, x, CHOSEN)) and found.dtype == dtype


def test_a_weight_reaches_a_router_although_the_experts_are_frozen():
    layer, x = experts().requires_grad_(False), inputs(2)
    weight = torch.ones(2, dtype=torch.float64, requires_grad=True)
    run(layer, x, [0, 1], weight=weight).square().sum().backward()
    assert weight.grad.abs().min() > 0 and all(parameter.grad is None for parameter in layer.parameters())


def test_gradients_reach_the_cores_of_the_chosen_experts_only():
    layer, x, chosen = experts().train(), inputs(3), [2, 0, 2]
    result, plain = run(layer, x, chosen), expected(layer, x, chosen)
    found, other = (torch.autograd.grad(y.square().sum(), list(layer.factors.cores)) for y in (result, plain))
    for one, two in zip(found, other, strict=True):
        assert two[[0, 2]].abs().amax((1, 2, 3)).min() > 0.1 and not two[[1, 3]].any()
        agree(one, two, 1e-10 * two.abs().max().item())


def test_without_a_chosen_expert_it_says_so():
    layer = experts()
    for start in (lambda: None, lambda: layer.context.begin(torch.ones(2, TOKENS).long(), torch.ones(2, TOKENS))):
        start()
        with pytest.raises(ValueError, match="slot has no expert for these rows: go through the module's forward"):
            layer(inputs(2))


def test_disabled_it_is_the_base_and_needs_no_expert():
    layer, x = experts(), inputs(2)
    with layer.context.disabled():
        assert torch.equal(layer(x), layer.base(x))


@pytest.mark.parametrize("task", range(E))
def test_a_tasks_own_factors_merge_into_its_weight(task):
    layer, x = experts(), inputs(3)
    a, b = layer.fixed_factors(task)
    assert a.shape == (R, D) and b.shape == (OUT, R) and layer.depends_on_task
    plain = expected(layer, x, [task] * 3)
    agree(layer.base(x) + SCALE * x @ (b @ a).mT, plain)
    layer.merge(task=task)
    agree(layer(x), plain)
    layer.unmerge()
    agree(run(layer, x, [task] * 3), plain)


def test_dropout_drops_the_experts_input_in_training_only():
    layer, x = experts(dropout=0.5), inputs(2)
    agree(run(layer, x, [1, 2]), expected(layer, x, [1, 2]))
    layer.train()
    torch.manual_seed(5)
    found = run(layer, x, [1, 2])
    torch.manual_seed(5)
    dropped = torch.dropout(x, 0.5, True)
    assert (dropped == 0).sum() > 10
    agree(found, layer.base(x) - layer.base(dropped) + expected(layer, dropped, [1, 2]))


@pytest.mark.parametrize("grad", [True, False])
def test_a_changed_core_acts_at_once(grad):
    layer, x = experts().train(), inputs(2)
    begin(layer.context, [1, 2])
    with torch.set_grad_enabled(grad):
        before = layer(x)
        with torch.no_grad():
            layer.factors.cores[1].mul_(2)
        agree(layer(x), expected(layer, x, [1, 2]))
        agree(layer(x) - layer.base(x), 2 * (before - layer.base(x)))


def test_recomputation_serves_the_rows_of_its_own_forward():
    layer, batches = experts().train(), [[0, 1], [3, 2]]
    plain, found = [], []
    for number, chosen in enumerate(batches):
        x = inputs(2, seed=number).requires_grad_()
        plain.append(expected(layer, x, chosen).square().sum())
        begin(layer.context, chosen)
        y = checkpoint(layer, x, use_reentrant=False, context_fn=layer.context.checkpoint_fns)
        found.append(y.square().sum())
    for one, other in zip(found, plain, strict=True):
        gradients = [torch.autograd.grad(loss, list(layer.factors.cores)) for loss in (one, other)]
        for mine, theirs in zip(*gradients, strict=True):
            assert theirs.any()
            agree(mine, theirs, 1e-10 * theirs.abs().max().item())


def test_under_autocast_experts_are_folded_in_fp32():
    layer, x = experts(dtype=torch.float32), inputs(3, dtype=torch.float32).requires_grad_()
    plain = layer.fold(torch.tensor([2, 0, 1]))
    with torch.autocast("cpu", torch.bfloat16):
        low = layer.fold(torch.tensor([2, 0, 1]))
        found = run(layer, x, [2, 0, 1])
    assert all(torch.equal(one, other) for one, other in zip(low, plain, strict=True))
    assert found.dtype == torch.bfloat16
    exact, leaves = expected(layer, x, [2, 0, 1]), [x, *layer.factors.cores]
    gradients = [torch.autograd.grad(y.float().square().sum(), leaves) for y in (found, exact)]
    for one, other in [(found, exact), *zip(*gradients, strict=True)]:
        assert 0 < (one - other).abs().max() < 0.02 * other.abs().max()


def test_it_compiles_without_a_graph_break():
    torch._dynamo.reset()
    layer, x = experts().train(), inputs(3).requires_grad_()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for chosen in ([2, 0, 1], [3, 3, 0]):
        begin(layer.context, chosen)
        results = [compiled(x), expected(layer, x, chosen)]
        agree(*results)
        found, other = (torch.autograd.grad(y.square().sum(), [x, *layer.factors.cores]) for y in results)
        for one, two in zip(found, other, strict=True):
            agree(one, two, 1e-10 * two.abs().max().item())
