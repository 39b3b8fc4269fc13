"""The fast way past a router's `forward`: the same output and gradients, in training, inference and decoding."""

import pytest
import torch

from moe_peft.layers.routers import Router
from moe_peft.methods.lora import LoRA
from moe_peft.methods.more import MoRE
from moe_peft.methods.trex import TRex
from moe_peft.quirks import CACHE
from tests.tiny import build, come_alive, output, random_batch

METHODS = {
    "trex": (TRex, {"r1": 2, "r2": 3}),
    "trex_projected": (TRex, {"r1": 2, "r2": 3, "clusters": 4}),
    "trex_with_diagonal": (TRex, {"r1": 2, "r2": 3, "diagonal": 2.0}),
    "trex_diagonal_alone": (TRex, {"r1": 3, "r2": 2, "use_prior": False, "diagonal": 2.0}),
    "mor1e_with_diagonal": (TRex, {"mode": "rank1", "r1": 3, "r2": 3, "diagonal": 2.0}),
    "trex_without_prior": (TRex, {"r1": 2, "r2": 3, "use_prior": False}),
    "mor1e": (TRex, {"r1": 3, "r2": 3, "mode": "rank1"}),
    "more": (MoRE, {"rank": 4}),
}
EVERY = pytest.mark.parametrize("name", METHODS)
KINDS = pytest.mark.parametrize("kind", ["causal", "seq2seq", "classifier"])


def made(name, kind="causal"):
    method, options = METHODS[name]
    module = build(method, kind, **options).double()
    if module.heads is not None:
        module.heads.float()  # they read features in fp32
    return come_alive(module, random_batch(kind=kind))


def free(module):
    """Takes the gates away: cores come from the routers' own `forward` then."""
    for layer in module.adapted.values():
        assert type(layer.router).gate is not Router.gate
        layer.router.gate = lambda x, context, slot: None
    return module


def gradients(module, batch):
    module.zero_grad(set_to_none=True)
    loss = module(batch)
    (loss * torch.arange(1, len(loss) + 1)).sum().backward()
    trained = {key: p.grad.clone() for key, p in module.named_parameters() if p.requires_grad}
    assert all(gradient.abs().max() > 0 for gradient in trained.values())
    return {"loss": loss.detach()} | trained


def agree(found, expected, tolerance=1e-9):
    assert found.keys() == expected.keys()
    for key, one in found.items():
        assert (one - expected[key]).norm() <= tolerance * expected[key].norm(), key


@EVERY
@KINDS
def test_a_gate_gives_what_its_routers_core_gives(name, kind):
    module, batch = made(name, kind), random_batch(kind=kind)
    fast = gradients(module.train(), batch)
    with torch.no_grad():
        fast_output = output(module.eval(), batch)
    agree(fast, gradients(free(module).train(), batch), 1e-9 if module.heads is None else 1e-5)
    with torch.no_grad():
        agree({"output": fast_output}, {"output": output(module.eval(), batch)})


@pytest.mark.parametrize("name", [*METHODS, "lora"])
def test_decoding_with_a_cache_on_ready_factors_gives_the_logits_of_the_whole_text(name):
    batch = random_batch()
    module = come_alive(build(LoRA).double(), batch) if name == "lora" else made(name)
    module.eval()
    ids, mask = batch["input_ids"], batch["attention_mask"]
    more = torch.randint(3, 50, (len(ids), 3), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        module.begin(batch)
        past = module.model(input_ids=ids, attention_mask=mask, use_cache=True)[CACHE]
        steps = []
        for at in range(3):
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
            step = module.model(input_ids=more[:, at : at + 1], attention_mask=mask, **{CACHE: past}, use_cache=True)
            steps.append(step.logits)
        module.begin(batch)
        whole = module.model(input_ids=torch.cat([ids, more], 1), attention_mask=mask).logits[:, -3:]
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-9, atol=1e-9)


def test_weights_that_change_are_seen_from_the_next_batch_on():
    module, batch = made("trex").eval(), random_batch()
    with torch.no_grad():
        before = output(module, batch)
        for layer in module.adapted.values():
            layer.factors.B.mul_(2)
        assert not torch.allclose(output(module, batch), before)


def test_loaded_weights_are_seen_at_once():
    module, batch = made("trex").eval(), random_batch()
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    with torch.no_grad():
        before = output(module, batch)
        doubled = {name: 2 * value if name.endswith("B") else value for name, value in module.adapter_state().items()}
        module.load_state_dict(doubled)
        assert not torch.allclose(module.model(**inputs).logits, before)


def test_a_model_that_is_cast_or_called_without_a_batch_is_served_anew():
    module, ids = build(LoRA).eval(), torch.arange(3, 13).view(2, 5)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    come_alive(module, random_batch())
    with torch.no_grad():
        single = output(module, batch)
        assert module.double().model(input_ids=ids).logits.dtype == torch.float64
        torch.testing.assert_close(module.model(input_ids=ids).logits.float(), single, rtol=1e-3, atol=1e-3)
        fresh = build(LoRA).eval()
        before = fresh.model(input_ids=ids).logits
        torch.nn.init.normal_(next(iter(fresh.adapted.values())).factors.B)
        assert not torch.allclose(fresh.model(input_ids=ids).logits, before) and not fresh.context._held


@EVERY
def test_recording_sees_every_linear_and_changes_nothing(name):
    module, batch = made(name).eval(), random_batch()
    module.context.recording = True
    with torch.no_grad():
        recorded = output(module, batch)
        assert set(module.context.records) == set(module.adapted)
        module.context.recording = False
        agree({"output": output(module, batch)}, {"output": recorded})
