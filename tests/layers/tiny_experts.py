"""One linear with a bank of tensor-train experts, and what it must give by the plain formula, row by row.

Shapes: B rows, S = 5 tokens, D in, O out, R rank, E experts.
"""

import torch
from torch import nn

from moe_peft.context import RoutingContext
from moe_peft.layers.expert_cache import ExpertCache
from moe_peft.layers.experts import ExpertLinear
from moe_peft.layers.factors import TensorTrainFactors
from moe_peft.layers.tensor_train import Layout, reconstruct

LAYOUT = Layout((2, 3), (5, 2))
D, OUT, R, E, SCALE, TOKENS = 6, 10, 3, 4, 1.7, 5
LAYERS = 2
LINE = LAYERS * R * (D + OUT) * 8
"""Bytes of one expert in fp64."""


def experts(count=E, dtype=torch.float64, seed=0, dropout=0.0):
    """A linear [OUT, D] in eval mode whose experts' cores are all random."""
    torch.manual_seed(seed)
    factors = TensorTrainFactors(LAYOUT, R, experts=count)
    for core in factors.cores:
        nn.init.normal_(core)
    return ExpertLinear(nn.Linear(D, OUT), factors, SCALE, dropout, RoutingContext(), "slot").to(dtype).eval()


def begin(context, chosen, **facts):
    """Begins a batch whose rows go to these experts."""
    ids = torch.arange(1, 1 + TOKENS * len(chosen)).view(len(chosen), TOKENS)
    key = context.begin(ids, torch.ones_like(ids))
    for name, fact in (facts | {"task_id": torch.tensor(chosen)}).items():
        context.put(name, fact, key)


def inputs(rows, seed=9, dtype=torch.float64):
    """Random inputs [B, S, D]."""
    return torch.randn(rows, TOKENS, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def expected(layer, x, chosen, weights=None):
    """W0 x_b + s w_b ΔW_e(b) x_b [B, ..., O], one row after the other; -1 is the bare base."""
    rows = []
    for row, expert in enumerate(chosen):
        y = nn.functional.linear(x[row], layer.base.weight, layer.base.bias)
        if expert >= 0:
            matrix = reconstruct([core[expert] for core in layer.factors.cores], LAYOUT)
            y = y + SCALE * (1 if weights is None else weights[row]) * x[row] @ matrix.mT
        rows.append(y)
    return torch.stack(rows)


def agree(one, other, tolerance=1e-12):
    """Asserts equality up to an absolute tolerance."""
    torch.testing.assert_close(one, other, rtol=0, atol=tolerance)


def cached(room=E, count=E, dtype=torch.float64):
    """Layers whose cache has room for so many experts, besides the null expert."""
    layers = [experts(count, dtype, seed) for seed in range(LAYERS)]
    return ExpertCache(layers, LINE * (room + 1)), layers


def run(cache, chosen):
    """Every layer's output for a batch whose rows go to these experts, and the lines in use."""
    line = cache.lines(torch.tensor(chosen))
    facts = {} if line is None else {"line": line}
    outputs = []
    for layer in cache.layers:
        begin(layer.context, chosen, **facts)
        outputs.append(layer(inputs(len(chosen), dtype=layer.weight.dtype)))
    return outputs, line


def served(cache, chosen):
    """Asserts that a batch's rows get their experts out of the tables, and returns the lines."""
    outputs, line = run(cache, chosen)
    assert line is not None
    for layer, found in zip(cache.layers, outputs, strict=True):
        agree(found, expected(layer, inputs(len(chosen)), chosen))
    return line.tolist()


def table_bytes(cache):
    """Bytes that all tables take."""
    return sum(part.untyped_storage().nbytes() for layer in cache.layers for part in layer.table or ())
