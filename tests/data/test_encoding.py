"""Ids by hand: <pad> 0, <s> 1, </s> 2, <unk> 3, then the words of the vocabulary from 4 on."""

import pytest

from moe_peft.data.encoding import Encoder
from moe_peft.data.tasks import TaskSpec
from tests.data.toys import word_tokenizer

WORDS = "the film was good bad : positive very negative user assistant system be kind 3.5"
THE, FILM, WAS, GOOD, BAD, COLON, POSITIVE, VERY, NEGATIVE, USER, ASSISTANT, SYSTEM, BE, KIND, VALUE = range(4, 19)
CHAT = (
    "{% if messages[0]['role'] == 'system' %}<s> system {{ messages[0]['content'] }} {% else %}<s> {% endif %}"
    "user {{ messages[-1]['content'] | trim }} assistant "
)
SPEC = TaskSpec("toy", "classification", "accuracy", "{text} :", ("very negative", "positive"))
ROW = {
    "id": "1",
    "text": "the film was good",
    "choices": ["very negative", "positive"],
    "label": 1,
    "target": "positive",
}


def encode(kind="causal", spec=SPEC, row=ROW, start=False, end=False, chat=None, **options):
    encoder = Encoder(word_tokenizer(WORDS, start, end, chat), kind, **options)
    return encoder.encode(spec, 0, [row])[0]


def test_prompt_answer_and_options_are_the_template_and_the_choices():
    row = encode()
    assert row.prompt == [THE, FILM, WAS, GOOD, COLON]
    assert row.answer == [POSITIVE, 2]
    assert row.options == [[VERY, NEGATIVE], [POSITIVE]]
    assert (row.row_id, row.text, row.target, row.truncated) == ("toy/1", "the film was good :", 1, 0)


def test_prompt_is_cut_from_the_left_by_the_longest_option_and_the_answer_is_whole():
    # the longest option has 2 tokens and the end token: 5 - 3 = 2 prompt tokens, whichever option is right
    for label in (0, 1):
        row = encode(max_length=5, row=ROW | {"label": label, "target": SPEC.choices[label]})
        assert row.prompt == [GOOD, COLON]
        assert row.truncated == 3
    assert row.answer == [POSITIVE, 2]


def test_one_prompt_token_is_enough():
    assert encode(max_length=4).prompt == [COLON]


def test_answer_that_leaves_no_prompt_token_is_counted_and_named():
    encoder = Encoder(word_tokenizer(WORDS), "causal", max_length=3)
    rows = [ROW | {"id": str(i)} for i in range(7)]
    with pytest.raises(ValueError) as error:
        encoder.encode(SPEC, 0, rows)
    assert "'toy': 7 rows" in str(error.value) and "0 (3 answer tokens)" in str(error.value)
    assert "max_length=3" in str(error.value) and "\n" not in str(error.value)


def test_tokenizers_own_start_token_is_kept_by_auto_and_its_end_token_never_splits_prompt_and_answer():
    assert encode(start=True, end=True).prompt == [1, THE, FILM, WAS, GOOD, COLON]


def test_start_token_survives_truncation():
    row = encode(start=True, max_length=6)
    assert row.prompt == [1, GOOD, COLON] and row.truncated == 3


@pytest.mark.parametrize(("bos", "first"), [("auto", THE), ("always", 1), ("never", THE)])
def test_start_token_policy_for_a_tokenizer_without_one(bos, first):
    assert encode(bos=bos).prompt[0] == first


@pytest.mark.parametrize(("bos", "starts"), [("auto", 1), ("always", 1), ("never", 0)])
def test_start_token_policy_for_a_tokenizer_with_one(bos, starts):
    assert encode(start=True, bos=bos).prompt.count(1) == starts


def test_seq2seq_prompt_ends_with_the_tokenizers_own_end_token():
    row = encode("seq2seq", end=True, max_length=6)
    assert row.prompt == [THE, FILM, WAS, GOOD, COLON, 2]
    assert row.answer == [POSITIVE, 2]


def test_seq2seq_prompt_truncation_keeps_its_end_token():
    assert encode("seq2seq", end=True, max_length=4).prompt == [WAS, GOOD, COLON, 2]


def test_classifier_has_special_tokens_and_a_target_but_no_answer():
    row = encode("classifier", start=True, end=True, max_length=5)
    assert row.prompt == [1, WAS, GOOD, COLON, 2]
    assert (row.answer, row.options, row.target) == ([], [], 1)


def test_chat_frames_the_prompt_once():
    row = encode(chat=CHAT, start=True, style="chat")
    assert row.prompt == [1, USER, THE, FILM, WAS, GOOD, COLON, ASSISTANT]
    assert row.text == "the film was good :"


def test_system_message_comes_first():
    assert encode(chat=CHAT, style="chat", system="be kind").prompt[:5] == [1, SYSTEM, BE, KIND, USER]


def test_chat_truncation_cuts_the_message_and_not_its_frame():
    row = encode(chat=CHAT, style="chat", max_length=8)
    assert row.prompt == [1, USER, GOOD, COLON, ASSISTANT] and row.truncated == 3


@pytest.mark.parametrize(("bos", "starts"), [("always", 1), ("never", 0)])
def test_start_token_policy_overrides_the_chat_template(bos, starts):
    assert encode(chat=CHAT, style="chat", bos=bos).prompt.count(1) == starts


@pytest.mark.parametrize(
    ("steps", "value", "text"),
    # 5 * 0.3 is 1.5 and goes to 2, though 0.3 / 0.2 is just below
    [(None, 2.53, "2.5"), (5, 2.53, "2.6"), (5, 0.3, "0.4"), (1, 2.53, "3.0"), (5, 5.0, "5.0")],
)
def test_numbers_are_rounded_to_steps_before_they_are_written(steps, value, text):
    tokenizer = word_tokenizer("film 0.4 2.5 2.6 3.0 5.0")
    encoder = Encoder(tokenizer, "seq2seq", number_steps=steps)
    row = encoder.encode(
        TaskSpec("sts", "regression", "pearson", "{text}"), 0, [{"id": "1", "text": "film", "value": value}]
    )[0]
    assert tokenizer.decode(row.answer[:-1]) == text
    assert row.row["value"] == row.target == value


def test_steps_of_numbers_must_be_positive():
    with pytest.raises(ValueError, match="number_steps=0 must be 1 or more"):
        Encoder(word_tokenizer(WORDS), "seq2seq", number_steps=0)


def test_regression_is_text_for_a_language_model_and_a_value_for_a_classifier():
    spec = TaskSpec("sts", "regression", "pearson", "{text}")
    row = {"id": "1", "text": "the film", "value": 3.4999}
    assert encode(spec=spec, row=row).answer == [VALUE, 2]
    assert encode("classifier", spec=spec, row=row).target == 3.4999


def test_generation_has_a_target_text_and_no_options():
    spec = TaskSpec("g", "generation", "exact_match", "{text}")
    row = encode(spec=spec, row={"id": "1", "text": "the film", "target": "was good"})
    assert (row.answer, row.options, row.target) == ([WAS, GOOD, 2], [], None)


@pytest.mark.parametrize(
    ("arguments", "telling"),
    [
        ({"style": "chat"}, "style='chat'"),
        ({"system": "be kind"}, "system"),
        ({"kind": "classifier", "bos": "never"}, "bos='never'"),
        ({"max_length": 1}, "max_length=1"),
    ],
)
def test_setting_that_cannot_be_honoured_is_refused(arguments, telling):
    with pytest.raises(ValueError, match=telling):
        encode(**arguments)


def test_always_needs_a_start_token():
    tokenizer = word_tokenizer(WORDS)
    tokenizer.bos_token = None
    with pytest.raises(ValueError, match="bos='always'"):
        Encoder(tokenizer, "causal", bos="always")


def sentencepiece_like():
    """A tokenizer that puts a blank before every text it is given, as Llama-2's and Gemma's do."""
    from tokenizers import Tokenizer, models, normalizers
    from transformers import PreTrainedTokenizerFast

    words = ["▁the", "▁film", "▁:", "▁very", "▁negative", "▁positive", "▁a", "▁", "▁good"]
    letters = sorted(set("".join(words)) - {"▁"})
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *((word, -1.0) for word in words)]
    core = Tokenizer(models.Unigram([*pieces, *((letter, -9.0) for letter in letters)], unk_id=0))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def test_a_tokenizer_that_begins_texts_with_a_blank_gets_one_blank_before_an_answer():
    tokenizer = sentencepiece_like()
    assert tokenizer.convert_ids_to_tokens(tokenizer(" positive")["input_ids"]) == ["▁", "▁positive"]
    row = Encoder(tokenizer, "causal").encode(SPEC, 0, [ROW | {"text": "the film"}])[0]
    assert row.prompt + row.answer == tokenizer("the film : positive</s>")["input_ids"]
    assert [tokenizer.convert_ids_to_tokens(option) for option in row.options] == [
        ["▁very", "▁negative"],
        ["▁positive"],
    ]


def test_without_a_prefix_such_a_tokenizers_own_blank_stays():
    row = Encoder(sentencepiece_like(), "seq2seq").encode(SPEC, 0, [ROW | {"text": "the film"}])[0]
    assert sentencepiece_like().convert_ids_to_tokens(row.answer) == ["▁positive", "</s>"]


@pytest.mark.parametrize("kind", ["causal", "seq2seq", "classifier"])
def test_unlabelled_row_has_options_but_no_answer(kind):
    row = encode(kind, row=ROW | {"label": None, "target": None})
    assert (row.answer, row.target) == ([], None)
    assert row.options == ([] if kind == "classifier" else [[VERY, NEGATIVE], [POSITIVE]])


def test_unlabelled_prompt_is_that_of_the_labelled_row():
    assert encode(max_length=5, row=ROW | {"label": None, "target": None}).prompt == encode(max_length=5).prompt


class TestSmolLM2:
    """The real tokenizer: a byte-level BPE whose pad token is its end token."""

    ROW = {"id": "1", "text": "A fine film.", "choices": ["negative", "positive"], "label": 1, "target": "positive"}
    SPEC = TaskSpec("sst2", "classification", "accuracy", "{text}\nSentiment:", ("negative", "positive"))

    def test_prompt_and_answer_join_to_the_plain_text(self, smollm2_tokenizer):
        row = Encoder(smollm2_tokenizer, "causal").encode(self.SPEC, 0, [self.ROW])[0]
        whole = smollm2_tokenizer("A fine film.\nSentiment: positive<|im_end|>")["input_ids"]
        assert row.prompt + row.answer == whole
        assert smollm2_tokenizer.decode(row.answer) == " positive<|im_end|>"

    def test_chat_is_the_tokenizers_own_template(self, smollm2_tokenizer):
        row = Encoder(smollm2_tokenizer, "causal", style="chat").encode(self.SPEC, 0, [self.ROW])[0]
        messages = [{"role": "user", "content": "A fine film.\nSentiment:"}]
        expected = smollm2_tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        assert row.prompt == expected
        assert smollm2_tokenizer.decode(row.answer) == "positive<|im_end|>"
