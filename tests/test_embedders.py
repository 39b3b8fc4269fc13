"""Embedders: padding, batch mates and answers never show; what is fitted, and what is state."""

import pytest
import torch
from torch.nn import functional

from moe_peft.batch import IGNORE_INDEX
from moe_peft.embedders import HiddenStates, InputEmbeddings, TfIdf
from moe_peft.sharding import shard_backbone
from tests.tiny_embedders import PROMPTS, bind, make_batch, texts

READERS = [
    (lambda: InputEmbeddings(), "llama"),
    (lambda: HiddenStates(2, keep=False), "llama"),
    (lambda: HiddenStates(1, keep=False), "gpt2"),
    (lambda: HiddenStates(2, keep=False), "bert"),
    (lambda: HiddenStates(2, keep=False), "t5"),
]


@pytest.mark.parametrize(("make", "backbone"), READERS)
def test_padding_side_and_width_change_no_bit(make, backbone):
    embedder = bind(make(), backbone)
    left = embedder.raw(make_batch(PROMPTS))
    assert torch.equal(left, embedder.raw(make_batch(PROMPTS, side="right", extra=3)))


@pytest.mark.parametrize(("make", "backbone"), READERS)
def test_a_prompt_alone_embeds_as_in_a_batch(make, backbone):
    embedder = bind(make(), backbone)
    together = embedder.raw(make_batch(PROMPTS))
    alone = torch.cat([embedder.raw(make_batch([prompt])) for prompt in PROMPTS])
    assert torch.equal(together, alone)


@pytest.mark.parametrize(("make", "backbone"), READERS)
def test_the_answer_changes_no_bit(make, backbone):
    embedder = bind(make(), backbone)
    prompt_only = embedder.raw(make_batch(PROMPTS))
    for answers in ([[30], [31, 32], [33, 34, 35], [36]], [[40, 41], [42], [43], [44, 45, 46]]):
        assert torch.equal(prompt_only, embedder.raw(make_batch(PROMPTS, answers)))


@pytest.mark.parametrize(("make", "backbone"), READERS)
def test_different_prompts_embed_differently(make, backbone):
    raw = bind(make(), backbone).raw(make_batch(PROMPTS))
    assert torch.pdist(raw).min() > 1e-3


def test_labels_mark_the_prompt_where_the_mask_is_absent():
    embedder, answers = bind(InputEmbeddings()), [[30], [31, 32], [33], [34]]
    batch = make_batch(PROMPTS, answers)
    batch["labels"] = torch.where(batch.pop("prompt_mask"), IGNORE_INDEX, batch["input_ids"])
    assert torch.equal(embedder.raw(batch), embedder.raw(make_batch(PROMPTS)))


def test_input_embeddings_are_the_mean_of_the_table_rows():
    embedder = bind(InputEmbeddings())
    table = embedder.bound.model.get_input_embeddings().weight
    expected = torch.stack([table[torch.tensor(prompt)].mean(0) for prompt in PROMPTS])
    torch.testing.assert_close(embedder.raw(make_batch(PROMPTS)), expected)


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("backbone", ["llama", "bert"])
def test_hidden_states_are_the_mean_of_that_layer(backbone, layer):
    embedder = bind(HiddenStates(layer), backbone)
    for prompt in PROMPTS:
        model = embedder.bound.model
        states = model(input_ids=torch.tensor([prompt]), output_hidden_states=True).hidden_states[layer]
        torch.testing.assert_close(embedder.raw(make_batch([prompt])), states.mean(1), rtol=0, atol=1e-5)


def test_hidden_states_ignore_the_adapters_and_the_backbones_dropout():
    class Shift(torch.nn.Module):
        def __init__(self, linear, context):
            super().__init__()
            self.linear, self.context = linear, (context,)

        def forward(self, x):
            return self.linear(x) + (1.0 if self.context[0].enabled else 0.0)

    embedder = bind(HiddenStates(2, keep=False), "bert")
    before = embedder.raw(make_batch(PROMPTS))
    _, model, context = embedder.bound
    model.encoder.layer[0].output.dense = Shift(model.encoder.layer[0].output.dense, context)
    model.train()
    assert torch.equal(before, embedder.raw(make_batch(PROMPTS)))
    assert all(module.training for module in model.modules()) and context.enabled


@pytest.mark.parametrize("layer", [-1, 3])
def test_a_layer_that_does_not_exist_is_refused(layer):
    with pytest.raises(ValueError, match=f"layer {layer} does not exist, this backbone has 0 to 2"):
        bind(HiddenStates(layer))


def test_an_empty_prompt_is_refused():
    batch = make_batch(PROMPTS)
    batch["prompt_mask"][2] = False
    with pytest.raises(ValueError, match="row 2 has no prompt tokens"):
        bind(InputEmbeddings()).raw(batch)


def test_the_backbone_is_no_part_of_the_state():
    for embedder in (bind(InputEmbeddings()), bind(HiddenStates(1))):
        assert set(embedder.state_dict()) == {"center", "fitted"} and not list(embedder.parameters())


def test_binding_again_keeps_the_fitted_state():
    embedder = bind(InputEmbeddings())
    embedder.fit([make_batch(PROMPTS)])
    center = embedder.center.clone()
    bind(embedder, seed=1)
    assert embedder.fitted and torch.equal(embedder.center, center)


def test_fit_centres_and_normalises():
    embedder = bind(InputEmbeddings())
    fitted = embedder.fit([make_batch(PROMPTS[:1]), make_batch(PROMPTS[1:])])
    raw = embedder.raw(make_batch(PROMPTS))
    torch.testing.assert_close(embedder.center, raw.mean(0))
    torch.testing.assert_close(fitted, functional.normalize(raw - raw.mean(0), dim=-1))
    torch.testing.assert_close(fitted, embedder(make_batch(PROMPTS)))


@pytest.mark.parametrize("make", [InputEmbeddings, TfIdf])
def test_the_order_of_texts_does_not_change_what_is_fitted(make):
    words = ["a cat sat here", "dogs run", "stock prices fell", "a dog sat"]
    one, other = bind(make()), bind(make())
    batch = make_batch(PROMPTS) | {"text": words}
    turned = make_batch(PROMPTS[::-1]) | {"text": words[::-1]}
    one.fit([batch])
    other.fit([turned])
    assert all(torch.equal(one.state_dict()[name], value) for name, value in other.state_dict().items())


def test_forward_before_fit_is_refused():
    with pytest.raises(ValueError, match="InputEmbeddings is not fitted: add the SemanticPriorFit callback"):
        bind(InputEmbeddings())(make_batch(PROMPTS))


def test_autocast_changes_no_bit():
    embedder = bind(HiddenStates(2, keep=False))
    embedder.fit([make_batch(PROMPTS)])
    expected = embedder(make_batch(PROMPTS))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(embedder(make_batch(PROMPTS)), expected)


def test_fingerprints_name_class_arguments_and_weights():
    prints = [bind(InputEmbeddings()), bind(InputEmbeddings(), seed=1), bind(HiddenStates(1)), bind(HiddenStates(2))]
    found = [embedder.fingerprint() for embedder in prints] + [TfIdf(64).fingerprint(), TfIdf(65).fingerprint()]
    assert len(set(found)) == len(found)
    assert bind(HiddenStates(1)).fingerprint() == found[2]


def test_fsdp_sharded_table_gives_the_same_vectors():
    embedder = bind(InputEmbeddings())
    expected = embedder.raw(make_batch(PROMPTS))
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import DTensor

        model = embedder.bound.model
        shard_backbone(model, init_device_mesh("cpu", (1,)))
        assert isinstance(model.get_input_embeddings().weight, DTensor)
        assert torch.equal(embedder.raw(make_batch(PROMPTS)), expected)
    finally:
        torch.distributed.destroy_process_group()


def test_tfidf_equals_scikit_learn():
    from sklearn.feature_extraction.text import HashingVectorizer, TfidfTransformer

    rows = ["the cat sat on the mat", "the dog ran", "prices fell on the market", "the the cat"]
    embedder = bind(TfIdf(128))
    embedder.fit([texts(*rows[:2]), texts(*rows[2:])])
    counts = HashingVectorizer(n_features=128, alternate_sign=False, norm=None).transform(rows)
    expected = torch.from_numpy(TfidfTransformer().fit_transform(counts).toarray()).float()
    torch.testing.assert_close(embedder.raw(texts(*rows)), expected)
    assert set(embedder.state_dict()) == {"center", "idf", "fitted"}


def test_tokens_are_decoded_where_a_batch_has_no_text():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"[PAD]": 0} | {f"w{index}": index for index in range(1, 60)}
    raw = Tokenizer(models.WordLevel(words, unk_token="[PAD]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    embedder = bind(TfIdf(256))
    embedder.bound.backbone._tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="[PAD]")
    spoken = texts(*(" ".join(f"w{token}" for token in prompt) for prompt in PROMPTS))
    embedder.fit([spoken])
    assert torch.equal(embedder(make_batch(PROMPTS, [[30], [31], [32], [33]])), embedder(spoken))
