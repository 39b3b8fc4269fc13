"""X-LoRA: its classifier is Hugging Face PEFT's, a linear is a loop over experts, weights are of the base's pass."""

from typing import Any

import pytest
import torch
from peft import XLoraConfig
from peft.tuners.xlora.classifier import XLoraClassifier
from peft.tuners.xlora.layer import XLoraLayer
from torch import nn

from moe_peft.counting import count_parameters
from moe_peft.methods.lora import LoRA
from moe_peft.methods.xlora import ExpertClassifier, XLoRA
from moe_peft.optim import trained_parameters
from tests.tiny import build, come_alive, logits, random_batch, randomise
from tests.tiny_counts import meta

GENERATE = {"max_new_tokens": 5, "min_new_tokens": 5, "pad_token_id": 0, "eos_token_id": None, "do_sample": False}
GENERATE |= {"return_dict_in_generate": True, "output_logits": True}


@pytest.mark.parametrize("layers", [None, 3])
@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("top_k", [None, 2])
def test_the_classifier_is_pefts(layers, depth, top_k):
    torch.manual_seed(0)
    own = ExpertClassifier(6, 4, layers, depth, 10, 0.2, 0.7, top_k, torch.device("cpu")).eval()
    config: Any = XLoraConfig(
        hidden_size=6,
        adapters={},
        xlora_depth=depth,
        xlora_size=10,
        layerwise_scalings=layers is not None,
        softmax_temperature=0.7,
        top_k_lora=top_k,
    )
    theirs = XLoraClassifier(nn.Linear(1, 1), config, 4, layers or 2, torch.device("cpu")).eval()
    theirs.layers.load_state_dict(own.layers.state_dict())
    states: Any = torch.randn(2, 5, 6)
    scalings = theirs(type("Result", (), {"hidden_states": [states]})(), input_ids=torch.zeros(2, 5))
    for at in range(layers or 1):
        layer: Any = XLoraLayer(None, None, None, at, config)  # type: ignore[arg-type]
        found = own(states) if layers is None else own(states)[:, :, at]
        torch.testing.assert_close(found, layer.get_maybe_topk_scalings(scalings), rtol=0, atol=1e-6)


def test_the_classifiers_dropout_is_for_training_alone():
    own = ExpertClassifier(6, 4, None, 2, 10, 0.5, 1.0, None, torch.device("cpu"))
    states = torch.randn(2, 5, 6)
    assert not torch.equal(own(states), own(states)) and torch.equal(own.eval()(states), own(states))


def alive(**arguments):
    """A method with random tensors, and a batch."""
    batch = random_batch()
    return come_alive(build(XLoRA, experts=3, rank=2, **arguments), batch, scale=0.5).eval(), batch


@pytest.mark.parametrize("layerwise", [False, True])
def test_a_linear_is_the_sum_of_its_experts_weighed_by_the_classifier(layerwise):
    module, batch = alive(layerwise=layerwise)
    at = 5
    slot, seen = list(module.adapted)[at], []
    layer = module.adapted[slot].register_forward_hook(lambda layer, args, out: seen.append((args[0], out)))
    with torch.no_grad():
        logits(module, batch)
        layer.remove()
        layer, (x, y) = module.adapted[slot], seen[-1]  # the first is the pass of the base
        position = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
        with module.context.disabled():
            bare = module.model(batch["input_ids"], batch["attention_mask"], position, output_hidden_states=True)
        g = module.classifier(bare.hidden_states[-1])
        g = g[:, :, at] if layerwise else g
        for row, prompt in enumerate(batch["prompt_mask"]):
            g[row, ~prompt] = g[row, prompt.nonzero().max()].clone()
        expected = layer.base(x)
        for expert in range(3):
            own = slice(2 * expert, 2 * expert + 2)
            update = x @ layer.factors.A[own].T @ layer.factors.B[:, own].T
            expected += layer.scale * g[..., expert : expert + 1] * update
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(y[real], expected[real], rtol=0, atol=1e-4)
    assert g[real].std(0).max() > 0.01


def test_a_zero_classifier_is_a_lora_of_the_experts_mean():
    module, batch = alive()
    for parameter in module.classifier.parameters():
        parameter.data.zero_()
    lora = build(LoRA, rank=6, alpha=16.0 * 6 / 2 / 3)
    for slot, layer in module.adapted.items():
        lora.adapted[slot].factors.A.data.copy_(layer.factors.A)
        lora.adapted[slot].factors.B.data.copy_(layer.factors.B)
    with torch.no_grad():
        torch.testing.assert_close(logits(module, batch), logits(lora, batch), rtol=0, atol=1e-4)


def test_one_routing_serves_all_linears_unless_asked_otherwise():
    for layerwise in (False, True):
        module, batch = alive(layerwise=layerwise)
        module.context.recording = True
        logits(module, batch)
        first, *others = module.context.records.values()
        assert all(torch.equal(own.weights, first.weights) for own in others) is not layerwise


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("prompt", [[5, 9, 33], [7]])
def test_what_is_written_is_scored_as_it_was_generated(prompt, use_cache):
    module, _ = alive()
    ids = torch.tensor([prompt])
    batch: Any = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        module.begin(batch)
        found = module.model.generate(**batch, **GENERATE, use_cache=use_cache)
        whole = found.sequences
        asked = torch.arange(whole.shape[1]).unsqueeze(0) < len(prompt)
        scored: Any = {"input_ids": whole, "attention_mask": torch.ones_like(whole), "prompt_mask": asked}
        expected = logits(module, scored)[:, len(prompt) - 1 : -1]
    torch.testing.assert_close(torch.stack(found.logits, 1), expected, rtol=0, atol=1e-4)


def test_frozen_experts_leave_the_classifier_alone_to_learn():
    module, batch = build(XLoRA, train_experts=False), random_batch()
    assert set(trained_parameters(module)) == {"classifier.layers.0.weight", "classifier.layers.0.bias"}
    for layer in module.adapted.values():
        layer.factors.B.data.normal_()
    assert any(".factors." in name for name in module.adapter_state())
    module.train()(batch).sum().backward()
    assert module.classifier.layers[0].weight.grad.any()


def test_gradient_checkpointing_gives_the_same_gradients():
    from tests.tiny import tiny_backbone

    found = []
    for checkpointing in (False, True):
        backbone = tiny_backbone("causal", gradient_checkpointing=checkpointing)
        module, batch = build(XLoRA, backbone=backbone, experts=3, rank=2), random_batch()
        randomise(module)
        module.train()(batch).sum().backward()
        found.append({name: own.grad for name, own in trained_parameters(module).items()})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"experts": [2, 4]}, r"experts: \[2, 4\] differ by layer, and one classifier weighs them all"),
        ({"depth": 0}, "depth: 0 must be at least 1"),
        ({"top_k": 0}, "top_k: 0 must be at least 1"),
        ({"temperature": 0.0}, "temperature: 0.0 divides the scores; give more than 0"),
    ],
)
def test_arguments_that_mean_nothing_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        build(XLoRA, **arguments)


def test_counts():
    assert count_parameters(meta("x-lora", train_experts=False))["trainable"] == 32_776
    counts = count_parameters(meta("x-lora", layerwise=True))
    assert counts["router"] == 7_341_824 and counts["factors"] == 8 * 19_988_480
