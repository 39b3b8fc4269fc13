"""One linear with a rank selector, in fp64, and its experts by plain loops.

Shapes: B rows, S sequence, D in, O out; R = 4 ranks, N = 4 experts, T = 3 tasks.
"""

import torch
from torch import nn

from moe_peft.context import RoutingContext
from moe_peft.layers.adapted import AdaptedLinear
from moe_peft.layers.factors import DenseFactors
from moe_peft.layers.nested_experts import nested_experts
from moe_peft.layers.rank_selector import RankSelector

D, OUT, R, T, SCALE = 7, 6, 4, 3, 1.7
SCALINGS = ["rank_over_r", "paper", "none", "code"]
LEARNED = ["full", "winner"]
ALL = ["full", "winner", "random", "fixed"]
# What each scaling multiplies component j of expert k by, for R = 4 and T = 3, written out.
CONSTANTS = {
    "rank_over_r": [1 / 4, 2 / 4, 3 / 4, 4 / 4],
    "paper": [1 / 3, 2 / 3, 3 / 3, 4 / 3],
    "none": [1.0, 1.0, 1.0, 1.0],
}
COMPONENTS = [1 / 16, 4 / 16, 9 / 16, 16 / 16]


def begin(context, tasks):
    """Begins a batch of these task ids, a row of five tokens each."""
    ids = torch.arange(1, 1 + 5 * len(tasks)).view(len(tasks), 5)
    context.put("task_id", torch.tensor(tasks), context.begin(ids, torch.ones_like(ids)))


def layer(selector="full", scaling="rank_over_r", ranks=(1, 2, 3, 4), start=(1, 3, 0), tasks=T, seed=0, **options):
    """An adapted linear in fp64 and training mode with random B, and a gate that prefers different experts."""
    torch.manual_seed(seed)
    base, factors = nn.Linear(D, OUT), DenseFactors(D, OUT, R, R)
    nn.init.normal_(factors.B)
    given = torch.tensor(start) if selector == "fixed" else None
    experts = nested_experts(ranks, R, tasks, scaling)
    router = RankSelector(options.pop("width", 5), experts, tasks, selector, given, **options)
    for parameter in router.parameters():
        nn.init.normal_(parameter)
    return AdaptedLinear(base, factors, router, SCALE, 0.0, RoutingContext(), "slot").double().train()


def inputs(tasks, seed=9):
    """Random inputs [B, 5, D] in fp64, a row for every task id."""
    return torch.randn(len(tasks), 5, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def expert_output(adapted, x, k, scaling):
    """c_k E_k(x) [B, S, O] with the scale, by a loop over the first k components."""
    a, b, y = adapted.factors.A, adapted.factors.B, 0
    for j in range(k):
        factor = COMPONENTS[j] if scaling == "code" else CONSTANTS[scaling][k - 1]
        y = y + SCALE * factor * (x @ a[j])[..., None] * b[:, j]
    return y


def agree(one, other, tolerance=1e-12):
    """Asserts equality up to an absolute tolerance."""
    torch.testing.assert_close(one, other, rtol=0, atol=tolerance)


def force(adapted, experts):
    """Makes the gate choose the given expert of every task, far from a tie."""
    router = adapted.router
    for parameter in (router.embedding.weight, router.weight, router.bias):
        parameter.data.zero_()
    router.embedding.weight.data[:, :T] = torch.eye(T)
    for task, expert in enumerate(experts):
        router.weight.data[expert, task] = 3.0
