"""An expert of a trained mixture is exported and compared as itself, wherever the router would send the rows."""

import pytest
import torch

from moe_peft.backbones import CausalLM
from moe_peft.interop.export import export, unfaithful
from moe_peft.interop.parity import parity, random_rows
from moe_peft.methods.tt_lora_moe import TTLoRAMoE
from tests.tiny import bare_logits, build, logits, random_batch, randomise
from tests.tiny_checkpoints import TASKS, backbones  # noqa: F401  (a fixture)


@pytest.fixture
def mixture(backbones):  # noqa: F811
    """Three experts, all different, and a router that sends every row to the last one."""
    backbone = CausalLM(str(backbones["causal"]), dtype="float32")
    module = build(TTLoRAMoE, backbone=backbone, tasks=TASKS, rank=3, alpha=1.0)
    randomise(module)
    batch = random_batch(6)
    batch["task_id"] = torch.arange(6) % 3
    moved = (logits(module, batch) - bare_logits(module, batch)).abs().amax((1, 2))
    assert moved.min() > 1e-2, "an expert does not move the output"
    module(batch).sum().backward()
    for layer in module.adapted.values():
        assert all(core.grad.abs().amax((1, 2, 3)).min() > 0 for core in layer.factors.cores)
    module.router_trained.fill_(True)
    module.router.forward = lambda features: torch.arange(3.0).expand(len(features), 3)
    return module.eval()


@pytest.mark.parametrize("to", ["peft", "merged"])
def test_every_experts_export_is_faithful(mixture, tmp_path, to):
    exports = export(mixture, to, "all", tmp_path / "out")
    assert len(exports) == 3 and unfaithful(exports) is None
    assert not mixture.route_by_task  # and the router decides again


def test_a_failing_comparison_leaves_the_router_in_charge(mixture, tmp_path, monkeypatch):
    exported = export(mixture, "peft", "tone", tmp_path / "out")[0]
    monkeypatch.setattr(mixture, "begin", lambda batch: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        parity(mixture, exported.folder, "tone", random_rows(mixture))
    assert not mixture.route_by_task
