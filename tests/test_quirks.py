"""What is told to frozen models before they are trained through."""

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from transformers import DynamicCache

from moe_peft import quirks
from moe_peft.methods.trex import TRex
from tests.tiny import build, come_alive, random_batch, tiny_backbone


def gradients(module, batch):
    module.zero_grad()
    module.train()(batch).sum().backward()
    return {name: own.grad.clone() for name, own in module.named_parameters() if own.requires_grad}


@pytest.mark.parametrize("kind", ["causal", "seq2seq"])
def test_offloading_moves_every_blocks_input_and_changes_no_gradient(monkeypatch, kind):
    batch, moved, back = random_batch(4, kind), [], []

    class Host(saved_tensors_hooks):
        """Stands in for the way to host memory and back."""

        def __init__(self, pin_memory):
            super().__init__(lambda tensor: moved.append(tensor.shape) or tensor, lambda t: back.append(t.shape) or t)

    monkeypatch.setattr(quirks, "save_on_cpu", Host)
    found = {}
    for offloaded in (False, True):
        backbone = tiny_backbone(kind, gradient_checkpointing=True, offload_activations=offloaded)
        module = build(TRex, kind, backbone=backbone, r1=2, r2=3)
        come_alive(module, batch)
        moved.clear(), back.clear()
        found[offloaded] = gradients(module, batch)
    torch.testing.assert_close(found[True], found[False], rtol=0, atol=0)
    assert len(moved) >= len(module.recomputed) > 1 and len(back) == len(moved)
    assert {tuple(shape) for shape in moved} >= {(*batch["input_ids"].shape, 32)}
    assert not any(shape[-1] == 48 for shape in moved), "something from inside a block"


def test_offloading_without_recomputation_is_refused():
    with pytest.raises(ValueError, match="offload_activations needs gradient_checkpointing: true"):
        tiny_backbone(offload_activations=True)


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_the_tokens_in_a_cache_are_counted_by_either_of_its_names(name):
    cache = DynamicCache()
    assert quirks.past_of({}) == quirks.past_of({name: None}) == quirks.past_of({name: cache}) == 0
    cache.update(torch.zeros(2, 1, 5, 4), torch.zeros(2, 1, 5, 4), 0)
    assert quirks.past_of({"cache": None, "past_key_values": None} | {name: cache}) == 5
