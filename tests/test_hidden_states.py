"""Hidden states of the frozen base: which token or mean of which layer, whose they are, and which are kept."""

import random

import numpy
import pytest
import torch

from moe_peft.backbones import CausalLM, Classifier
from moe_peft.context import RoutingContext
from moe_peft.embedders import HiddenStates, cache, passes
from moe_peft.embedders.cache import EmbeddingCache
from tests.tiny_embedders import BERT, LLAMA, PROMPTS, bind, make_batch

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


def test_a_folder_does_not_mix_what_auto_stands_for(tmp_path):
    """One decoder as a classifier's backbone, pooled by its last token and then by the mean."""
    vectors = []
    for pooling in ("last", "mean"):
        backbone = Classifier("tiny", dtype="float32", shape=LLAMA, random_weights=True, pooling=pooling)
        torch.manual_seed(0)
        embedder = HiddenStates(None, "auto", cache_dir=str(tmp_path))
        embedder.bind(backbone, backbone.load(), RoutingContext())
        vectors.append(embedder.raw(make_batch(PROMPTS)))
    assert (vectors[0] - vectors[1]).abs().max() > 1e-2


# ---- a vector is its text's own --------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [passes.ON_CPU, passes.ELSEWHERE])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_the_batch_that_a_prompt_came_in_changes_no_bit(kind, dtype, shape, monkeypatch):
    monkeypatch.setattr(passes, "ON_CPU", shape)
    torch.manual_seed(0)
    fields = {"dtype": dtype, "random_weights": True}
    backbone = CausalLM("t", shape=LLAMA, **fields) if kind == "llama" else Classifier("t", shape=BERT, **fields)
    embedder = HiddenStates(None, "auto", keep=False)
    embedder.bind(backbone, backbone.load(), RoutingContext())
    draw = random.Random(0)
    prompts = [[draw.randrange(1, 60) for _ in range(draw.randrange(2, 40))] for _ in range(24)]
    together = embedder.raw(make_batch(prompts))
    for rows in (1, 7):
        order = draw.sample(range(24), 24)
        for some in (order[start : start + rows] for start in range(0, 24, rows)):
            assert torch.equal(embedder.raw(make_batch([prompts[row] for row in some])), together[some])


def test_passes_of_a_shape_serve_every_text_and_depend_on_its_length_alone():
    lengths = [3, 40, 33, 1, 32, 64, 65, 7, 5, 9, 11]
    found = list(passes.passes(lengths, passes.Shape(4, 32)))
    assert {text for texts in found for text in texts} == set(range(len(lengths)))
    assert all(len(texts) == 4 for texts in found)
    for texts in found:
        ids, mask = passes.padded([torch.ones(lengths[text], dtype=torch.long) for text in texts], 32, value=9)
        assert ids.shape == (4, -(-lengths[texts[0]] // 32) * 32)
        assert torch.equal(ids == 1, mask) and ids[~mask].eq(9).all()
        assert mask.sum(1).tolist() == [lengths[text] for text in texts]


# ---- what is kept -------------------------------------------------------------------------------------


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
        assert torch.equal(kept.raw(batch), plain.raw(batch))
    assert sum(seen) == len(PROMPTS), "every prompt goes through the model once"


def test_prompts_that_begin_alike_are_kept_apart():
    plain, kept = bind(HiddenStates(None, "mean", keep=False)), bind(HiddenStates(None, "mean"))
    prompts = [[1, 2], [1, 2, 3], [12, 3], [1, 23], [2, 1]]
    for prompt in prompts:
        kept.raw(make_batch([prompt]))
    assert torch.equal(kept.raw(make_batch(prompts)), plain.raw(make_batch(prompts)))


def test_vectors_kept_while_nothing_learned_serve_training():
    embedder = bind(HiddenStates(None, "last"))
    with torch.inference_mode():
        embedder.raw(make_batch(PROMPTS))
    weight = torch.nn.Parameter(torch.ones(32))
    (embedder.raw(make_batch(PROMPTS)) @ weight).sum().backward()
    assert weight.grad.abs().max() > 0


def test_another_model_is_not_given_the_last_ones_vectors():
    embedder = bind(HiddenStates(None, "last"))
    before = embedder.raw(make_batch(PROMPTS))
    bind(embedder, seed=1)
    expected = bind(HiddenStates(None, "last"), seed=1).raw(make_batch(PROMPTS))
    assert (expected - before).abs().max() > 1e-2
    assert torch.equal(embedder.raw(make_batch(PROMPTS)), expected)


def test_memory_keeps_the_first_vectors_that_fit_and_the_others_are_made_again(monkeypatch):
    width = 32 * 4
    monkeypatch.setattr(cache, "MEMORY_LIMIT", 2 * width + width // 2)
    plain, kept = bind(HiddenStates(None, keep=False)), bind(HiddenStates(None))
    seen, batch = counted(kept), make_batch(PROMPTS)
    for times in (4, 6, 8):
        assert torch.equal(kept.raw(batch), plain.raw(batch))
        assert sum(seen) == times


def on_disk(folder, layer=None, seed=0, dtype="float32"):
    """An embedder on a random llama, and how many prompts of a batch went through it."""
    torch.manual_seed(seed)
    backbone = CausalLM("t", dtype, shape=LLAMA, random_weights=True)
    embedder = HiddenStates(layer, "last", cache_dir=str(folder))
    embedder.bind(backbone, backbone.load(), RoutingContext())
    seen = counted(embedder)
    return embedder.raw(make_batch(PROMPTS)), sum(seen)


def test_another_run_reads_the_vectors_on_disk(tmp_path):
    first, passed = on_disk(tmp_path)
    assert passed == len(PROMPTS)
    for file in tmp_path.rglob("*.npy"):
        vector = numpy.load(file)
        numpy.save(file, vector + 1)
    again, passed = on_disk(tmp_path)
    assert torch.equal(again, first + 1) and passed == 0


@pytest.mark.parametrize("other", [{"layer": 1}, {"seed": 1}, {"dtype": "bfloat16"}])
def test_another_layer_model_or_precision_misses_the_disk(tmp_path, other):
    on_disk(tmp_path)
    assert on_disk(tmp_path, **other)[1] == len(PROMPTS)


def test_a_memory_that_is_full_still_reads_the_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "MEMORY_LIMIT", 0)
    store, vector = EmbeddingCache(tmp_path), numpy.arange(3.0)
    store.put("ab", vector)
    assert numpy.array_equal(store.get("ab"), vector)


def test_a_folder_for_nothing_is_refused():
    with pytest.raises(ValueError, match="HiddenStates: cache_dir 'here' keeps vectors, but keep is false"):
        HiddenStates(1, keep=False, cache_dir="here")


def test_fingerprints_tell_poolings_apart_and_keeping_is_no_difference():
    prints = [bind(HiddenStates(1, pooling)).fingerprint() for pooling in ("mean", "last", "auto")]
    assert prints[2] == prints[1], "what auto stands for, here a decoder's last token"
    assert len({*prints, bind(HiddenStates(None)).fingerprint()}) == 3
    assert bind(HiddenStates(1, "last", keep=False)).fingerprint() == prints[1]
    assert prints[0].startswith("HiddenStates(layer=1) of "), "checkpoints of older runs name it so"


def test_an_unknown_pooling_is_refused():
    with pytest.raises(ValueError, match="HiddenStates: pooling 'max' is unknown; use mean, last or auto"):
        HiddenStates(1, "max")
