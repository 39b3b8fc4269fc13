"""Hidden states of the frozen base: which token or mean of which layer, and vectors that are kept."""

import pytest
import torch

from moe_peft.embedders import HiddenStates
from tests.tiny_embedders import PROMPTS, bind, make_batch

BACKBONES = ["llama", "gpt2", "bert", "t5"]
LAST = {"llama": "last", "gpt2": "last", "bert": "mean", "t5": "mean"}
"""What "auto" stands for."""


def states(embedder, prompt, layer):
    """A layer's output [S, d] for one prompt, by the bare model itself."""
    model = embedder.bound.model
    trunk = model.get_encoder() if embedder.bound.backbone.kind == "seq2seq" else model
    with torch.no_grad():
        return trunk(input_ids=torch.tensor([prompt]), output_hidden_states=True).hidden_states[layer][0]


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("pooling", ["mean", "last", "auto"])
@pytest.mark.parametrize("layer", [None, 1])
@pytest.mark.parametrize("side", ["left", "right"])
def test_pooling_by_the_bare_model(backbone, pooling, layer, side):
    embedder = bind(HiddenStates(layer, pooling), backbone)
    found = embedder.raw(make_batch(PROMPTS, [[30], [31, 32], [33], []], side=side, extra=2))
    last = (LAST[backbone] if pooling == "auto" else pooling) == "last"
    for prompt, vector in zip(PROMPTS, found, strict=True):
        expected = states(embedder, prompt, -1 if layer is None else layer)
        torch.testing.assert_close(vector, expected[-1] if last else expected.mean(0), rtol=0, atol=1e-5)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_no_layer_is_the_models_own_last_state(backbone):
    """After the final norm, where a model has one."""
    embedder = bind(HiddenStates(None, "last"), backbone)
    model = embedder.bound.model
    trunk = {"t5": lambda: model.get_encoder(), "bert": lambda: model}.get(backbone, lambda: model.base_model)()
    with torch.no_grad():
        expected = trunk(input_ids=torch.tensor(PROMPTS[:1])).last_hidden_state[:, -1]
    torch.testing.assert_close(embedder.raw(make_batch(PROMPTS[:1])), expected, rtol=0, atol=1e-6)


def counted(embedder):
    """Counts the prompts that reach the model."""
    seen = []
    embedder.bound.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    return seen


@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize("backbone", ["llama", "bert"])
def test_kept_vectors_are_those_of_the_model_whatever_batch_they_came_in(backbone, pooling):
    plain, kept = (bind(HiddenStates(None, pooling, keep), backbone) for keep in (False, True))
    seen = counted(kept)
    for rows in ([0, 1], [2, 1, 1, 0], [3, 0], [0, 1, 2, 3]):
        batch = make_batch([PROMPTS[row] for row in rows], [[30 + row] for row in rows], extra=len(rows))
        torch.testing.assert_close(kept.raw(batch), plain.raw(batch), rtol=0, atol=1e-6)
    assert seen == [2, 1, 1], "every prompt goes through the model once"


def test_prompts_that_begin_alike_are_kept_apart():
    plain, kept = bind(HiddenStates(None, "mean")), bind(HiddenStates(None, "mean", keep=True))
    prompts = [[1, 2], [1, 2, 3], [12, 3], [1, 23], [2, 1]]
    for prompt in prompts:
        kept.raw(make_batch([prompt]))
    torch.testing.assert_close(kept.raw(make_batch(prompts)), plain.raw(make_batch(prompts)), rtol=0, atol=1e-6)


def test_vectors_kept_while_nothing_learned_serve_training():
    embedder = bind(HiddenStates(None, "last", keep=True))
    with torch.inference_mode():
        embedder.raw(make_batch(PROMPTS))
    weight = torch.nn.Parameter(torch.ones(32))
    (embedder.raw(make_batch(PROMPTS)) @ weight).sum().backward()
    assert weight.grad.abs().max() > 0


def test_another_model_is_not_given_the_last_ones_vectors():
    embedder = bind(HiddenStates(None, "last", keep=True))
    before = embedder.raw(make_batch(PROMPTS))
    bind(embedder, seed=1)
    expected = bind(HiddenStates(None, "last"), seed=1).raw(make_batch(PROMPTS))
    assert (expected - before).abs().max() > 1e-2
    assert torch.equal(embedder.raw(make_batch(PROMPTS)), expected)


def test_fingerprints_tell_poolings_apart_and_keeping_is_no_difference():
    prints = [bind(HiddenStates(1, pooling)).fingerprint() for pooling in ("mean", "last", "auto")]
    assert len({*prints, bind(HiddenStates(None)).fingerprint()}) == 4
    assert bind(HiddenStates(1, "last", keep=True)).fingerprint() == prints[1]
    assert prints[0].startswith("HiddenStates(layer=1) of "), "checkpoints of older runs name it so"


def test_an_unknown_pooling_is_refused():
    with pytest.raises(ValueError, match="HiddenStates: pooling 'max' is unknown; use mean, last or auto"):
        HiddenStates(1, "max")
