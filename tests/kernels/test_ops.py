"""The functional operators that hold the kernels under torch.compile: what torch demands of them, what they count."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from moe_peft.kernels import eager, gpu, ops
from moe_peft.kernels.eager import Plan
from moe_peft.kernels.gated import backend
from moe_peft.kernels.operands import flat, prepare
from moe_peft.kernels.reference import Gate
from moe_peft.methods.lora import LoRA
from tests.kernels.test_gated import BATCH, GATES, INPUTS, OUTPUTS, SCALE, SEQUENCE, agree, gradients, operands, plain
from tests.tiny import build

SOME = pytest.mark.parametrize("name", ["identity", "row", "block_prior", "matrix", "matrix_alone"])
BY_ROW = pytest.mark.parametrize("by_row", [False, True], ids=["shared", "by_row"])


def arguments(name, by_row=False):
    """Returns what the operator takes, leaves wherever it has a gradient."""
    base, (x, a, b, rows, alpha, beta) = operands(name, by_row)
    gate = Gate(GATES[name][0], rows, alpha, beta)
    w, bt, plan, _, beta = prepare(x, a, b, gate, SCALE, x.dtype)
    tensors = [flat(base(x), w), flat(x, w), w, bt, alpha, beta]
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in tensors]
    return (*leaves, None, *plan, "eager")


@SOME
@BY_ROW
def test_torch_finds_nothing_wrong_with_the_operators(name, by_row):
    given = arguments(name, by_row)
    torch.library.opcheck(ops.gated_update, given)
    with torch.no_grad():
        y, *kept = ops.gated_update(*given)
        detached = [one.detach() if isinstance(one, torch.Tensor) else one for one in given]
        torch.library.opcheck(ops.gated_update_backward, (torch.ones_like(y), *detached[1:7], *kept, *detached[7:]))


def through_operator(x, base, a, b, gate):
    (w, bt, plan, alpha, beta), y = prepare(x, a, b, gate, SCALE, x.dtype), base(x)
    return ops.gated_update(flat(y, w), flat(x, w), w, bt, alpha, beta, None, *plan, "eager")[0].view_as(y)


@SOME
@BY_ROW
def test_values_and_gradients_equal_the_specification(name, by_row):
    base, leaves = operands(name, by_row)
    agree(gradients(through_operator, name, base, leaves), gradients(plain, name, base, leaves))


@pytest.mark.parametrize("name", ["identity", "matrix"])
def test_compiled_it_stays_one_operator(name):
    torch._dynamo.reset()
    base, leaves = operands(name)
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph

    def update(x, base, a, b, gate):
        return through_operator(x, base, a, b, gate)

    compiled = torch.compile(
        lambda x, a, b, *gate: update(x, base, a, b, Gate(GATES[name][0], *gate)), fullgraph=True, backend=keep
    )
    found = gradients(lambda x, base, a, b, gate: compiled(x, a, b, *gate[1:]), name, base, leaves)
    agree(found, gradients(plain, name, base, leaves))
    assert sum("gated_update" in str(node.target) for graph in graphs for node in graph.graph.nodes) == 1


def test_the_operators_count_the_flops_of_their_products():
    given = arguments("matrix")
    _, r, q, e, *_ = GATES["matrix"]
    tokens = BATCH * SEQUENCE
    with FlopCounterMode(display=False) as counter:
        y = ops.gated_update(*given)[0]
        forward = counter.get_total_flops()
        y.sum().backward()
    assert forward == 2 * tokens * ((r + e) * INPUTS + q * OUTPUTS)
    assert counter.get_total_flops() == 3 * forward


def test_a_backend_is_chosen_by_name_and_device():
    assert backend("auto", False) is eager and backend("torch", True) is eager
    assert backend("auto", True) is gpu is backend("auto", True, Plan("matrix", 4, 1, 1.0), 32)
    assert backend("auto", True, Plan("diagonal", 5000, 1, 1.0), 5000) is eager  # more pairs than a program holds
    with pytest.raises(ValueError, match="kernels: triton needs the package triton and a GPU; use auto or torch"):
        backend("triton", False)


def test_a_module_refuses_kernels_that_there_are_not():
    with pytest.raises(ValueError, match="kernels: 'cuda' is unknown; use auto, torch or triton"):
        build(LoRA, kernels="cuda")
    assert build(LoRA, kernels="torch").context.kernels == "torch"
