"""LoRAMoE's localized balancing constraint: its formula, and which way its sign draws."""

import pytest
import torch

from moe_peft.methods.lora_moe import LoRAMoE
from moe_peft.methods.mixture_losses import Trace
from tests.tiny import TASKS, build, random_batch, randomise, tiny_backbone

E, DELTA = 4, 0.1
KNOWLEDGE = torch.tensor([0, 0, 1, 1])
"""Tasks of four rows; task 0 asks for knowledge."""


def constrained(delta=DELTA, **options):
    """Balanced by groups, `tone` being the task that asks for knowledge."""
    arguments = {"experts": E, "rank": 2, "constraint": 0.5, "delta": delta, "knowledge_tasks": ["tone"]}
    return LoRAMoE(backbone=tiny_backbone(), tasks=TASKS, **arguments | options)


def loss_of(gates, real=None, delta=DELTA, tasks=KNOWLEDGE):
    """The constraint of a router with these weights [B, S, E]."""
    real = torch.ones(gates.shape[:2], dtype=gates.dtype) if real is None else real
    return constrained(delta).localized_balance({"a": Trace(gates.log(), gates, real, real.sum())}, tasks).item()


def preferring(own):
    """Gates of four rows of which each prefers its own group's experts, or the other group's, by δ."""
    same = (KNOWLEDGE == 0).unsqueeze(1) == (torch.arange(E) < E // 2)
    sign = 1 if own else -1
    return torch.where(same, 1 + sign * DELTA, 1 - sign * DELTA).double().div(E).unsqueeze(1).expand(-1, 3, -1)


def test_it_is_the_variance_over_the_squared_mean_of_the_weighted_shares():
    generator = torch.Generator().manual_seed(0)
    gates = torch.rand(4, 3, E, generator=generator, dtype=torch.float64)
    gates = gates / gates.sum(-1, keepdim=True)
    real = torch.tensor([[1, 1, 1], [0, 1, 1], [0, 0, 1], [1, 1, 1]], dtype=torch.float64)
    values = []
    for row in range(4):
        tokens = [at for at in range(3) if real[row, at]]
        for expert in range(E):
            share = sum(gates[row, at, expert].item() for at in tokens) / len(tokens)
            own = (KNOWLEDGE[row] == 0) == (expert < E // 2)
            values.append(share * (1 + DELTA if own else 1 - DELTA))
    values = torch.tensor(values, dtype=torch.float64)
    assert loss_of(gates, real) == pytest.approx((values.var() / values.mean() ** 2).item(), rel=1e-6)


def test_as_printed_it_is_least_where_rows_prefer_the_other_group():
    other, own = loss_of(preferring(own=False)), loss_of(preferring(own=True))
    assert other == pytest.approx(0, abs=1e-12) and own == pytest.approx(0.040, abs=4e-3)


def test_a_negative_delta_draws_rows_to_their_own_group():
    other, own = (loss_of(preferring(own), delta=-DELTA) for own in (False, True))
    assert own == pytest.approx(0, abs=1e-12) and other == pytest.approx(0.040, abs=4e-3)


def test_without_delta_even_gates_cost_nothing_whatever_the_lengths():
    real = torch.tensor([[1, 1, 1], [0, 1, 1], [0, 0, 1], [1, 1, 1]], dtype=torch.float64)
    assert loss_of(torch.full((4, 3, E), 1 / E, dtype=torch.float64), real, delta=0.0) == pytest.approx(0, abs=1e-12)


def test_it_moves_routers_the_way_its_sign_says():
    """A few steps on the constraint alone; the share of knowledge rows' weights on the knowledge experts."""
    shares = {}
    for delta in (0.3, -0.3):
        module = build(LoRAMoE, experts=E, rank=2, constraint=1.0, delta=delta, knowledge_tasks=["tone"])
        randomise(module, scale=0.05)
        batch = random_batch()
        routers = [layer.router.weight for layer in module.adapted.values()]
        optimizer = torch.optim.Adam(routers, lr=0.03)
        for _ in range(10):
            module.begin(batch)
            optimizer.zero_grad()
            module.step_losses(batch)["constraint"].backward()
            optimizer.step()
        module.eval().context.recording = True
        module(batch)
        real = (batch["attention_mask"] * (batch["task_id"] == 0).unsqueeze(1)).bool()
        found = [own.weights[real][:, : E // 2].sum(-1).mean() for own in module.context.records.values()]
        shares[delta] = torch.stack(found).mean().item()
    assert shares[0.3] < 0.49 < 0.51 < shares[-0.3]


def test_experts_are_called_by_their_groups():
    names = constrained().expert_names("a", E)
    assert names == ["knowledge 0", "knowledge 1", "other 2", "other 3"]
    assert constrained(constraint=0.0, knowledge_tasks=None).expert_names("a", 3) == ["0", "1", "2"]
