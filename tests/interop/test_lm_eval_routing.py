"""Which task serves a row of lm-eval's, and how its text becomes tokens."""

import pytest
import torch

from moe_peft.data.encoding import Encoder
from moe_peft.data.tasks import TaskSpec
from tests.data.toys import TOY_WORDS, ToyBackbone, word_tokenizer
from tests.interop.tiny_lm_eval import Request, RequestEncoder, ask, backbones, halving, lm, offline

FIXTURES = (backbones, lm, offline)
ASKED = [("film was good :", f" {word}") for word in ("positive", "negative", "good", "bad")]


def scores(model, task):
    return [score for score, _ in ask(model, task, *ASKED)]


# ---- tasks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["MoRE", "TTLoRAMoE"])
def test_a_row_is_served_as_its_own_task(lm, method):
    given = {"routing": "oracle"} if method == "TTLoRAMoE" else {}
    model = lm(method, tasks="mine:mood;other:tone", **given)
    found = {task: scores(model, task) for task in ("tone", "mood", "mine", "other")}
    assert found["mine"] == found["mood"] and found["other"] == found["tone"]
    assert max(abs(a - b) for a, b in zip(found["tone"], found["mood"], strict=True)) > 1e-3


@pytest.mark.parametrize("method", ["LoRA", "TRex", "TTLoRA", "TTLoRAMoE"])
def test_a_method_that_needs_no_task_takes_any(lm, method):
    model = lm(method)
    assert scores(model, "hellaswag") == pytest.approx(scores(model, "tone"), abs=1e-5)


@pytest.mark.parametrize("method", ["MoRE", "TTLoRAMoE"])
def test_a_method_that_needs_a_task_names_those_it_knows(lm, method):
    model = lm(method)
    if method == "TTLoRAMoE":
        model.module.router_trained.fill_(False)
    expected = "task 'hellaswag' is none of the adapter's .tone, sci/topic, mood.: .* tasks=hellaswag:TASK"
    with pytest.raises(ValueError, match=expected) as caught:
        ask(model, "hellaswag", *ASKED)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=expected):
        ask(model, "hellaswag", ("film", {"until": [], "max_gen_toks": 4}), kind="generate_until")


def test_an_unknown_task_goes_the_method_s_own_way_where_it_has_one(lm):
    mean, known = lm("MoRE", unknown_task="mean"), lm("MoRE")
    for selector in known.module.selectors().values():  # a task of the mean embedding in the first one's place
        table = selector.embedding.weight.data
        table[0] = table.mean(0)
    assert scores(mean, "hellaswag") == pytest.approx(scores(known, "tone"), abs=1e-5)
    assert scores(mean, "tone") != pytest.approx(scores(known, "tone"), abs=1e-3)


def test_a_router_reads_the_context_alone(lm):
    model = lm("TTLoRAMoE")
    read = []
    choose = model.module.choose
    model.module.choose = lambda scores: read.append(scores) or choose(scores)
    for asked in ASKED:
        ask(model, "hellaswag", asked)
    ask(model, "hellaswag", ("happy happy :", " good"))
    assert all(torch.allclose(own, read[0]) for own in read[1:-1]) and not torch.allclose(read[-1], read[0])


# ---- tokens ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [False, True])
@pytest.mark.parametrize("kind", ["causal", "seq2seq"])
@pytest.mark.parametrize("template", ["{text} :", "{text} : "])
def test_a_document_s_continuations_are_the_options_of_our_own_row(kind, start, template):
    backbone = ToyBackbone(kind, word_tokenizer(TOY_WORDS, start=start, end=kind == "seq2seq"))
    texts = ["film was good", "film " * 9 + "bad"]  # the second is too long
    choices = ["positive", "negative good"]
    spec = TaskSpec("t", "multiple_choice", "accuracy", template)
    rows = [{"id": str(at), "text": text, "choices": choices, "label": 0} for at, text in enumerate(texts)]
    ours = Encoder(backbone.tokenizer(), kind, 8).encode(spec, 3, rows)
    requests = [
        Request("theirs", str(at), template.format(text=text), f" {choice}")
        for choice in choices
        for at, text in enumerate(texts)
    ]
    theirs = RequestEncoder(backbone, 8, "auto", {"theirs": 3}).options(requests)
    assert [asked.numbers for asked in theirs] == [[0, 2], [1, 3]]
    assert [asked.row.task_id for asked in theirs] == [3, 3] and ours[1].truncated
    for asked, own in zip(theirs, ours, strict=True):
        assert (asked.row.prompt, asked.row.options) == (own.prompt, own.options)


@pytest.mark.parametrize(("kind", "kept"), [("causal", 5), ("seq2seq", 8)])
def test_a_prompt_leaves_room_for_what_is_to_be_written(kind, kept):
    tokenizer = word_tokenizer(TOY_WORDS)
    encoder = RequestEncoder(ToyBackbone(kind, tokenizer), 8, "auto", {})
    text = "film was good : negative positive after comes 1 2"
    row = encoder.prompts([Request("t", "0", text)], new_tokens=3)[0].row
    assert row.prompt == tokenizer(text)["input_ids"][-kept:]


def test_blanks_before_a_continuation_are_its_own(smollm2_tokenizer):
    def ids(text):
        return smollm2_tokenizer(text, add_special_tokens=False)["input_ids"]

    encoder = RequestEncoder(ToyBackbone("causal", smollm2_tokenizer), 64, "auto", {})
    pairs = [("Answer:", " yes"), ("Answer: ", "yes"), ("Answer:", "\n yes"), ("Answer:\n ", "yes"), ("", "yes")]
    (a, b, c, d, e) = (encoder.options([Request("t", "0", *pair)])[0].row for pair in pairs)
    assert (a.prompt, a.options) == (b.prompt, b.options) == (ids("Answer:"), [ids(" yes")])
    assert (c.prompt, c.options) == (d.prompt, d.options) == (ids("Answer:"), [ids("\n yes")])
    assert (e.prompt, e.options) == ([smollm2_tokenizer.bos_token_id], [ids("yes")])


def same_conversation(model, tokenizer, bos):
    """A conversation through lm-eval's model, and the same by our own chat style."""
    model.tokenizer, model.encoder = tokenizer, RequestEncoder(ToyBackbone("causal", tokenizer), 64, bos, {})
    context = model.apply_chat_template([{"role": "user", "content": "film was"}])
    found = model.encoder.options([Request("t", "0", context, "good")])[0].row
    spec = TaskSpec("t", "multiple_choice", "accuracy", "{text}")
    rows = [{"id": "0", "text": "film was", "choices": ["good"], "label": 0}]
    ours = Encoder(tokenizer, "causal", 64, style="chat", bos=bos).encode(spec, 0, rows)[0]
    return (found.prompt, found.options), (ours.prompt, ours.options)


@pytest.mark.parametrize("own", ["", "<s> "])
@pytest.mark.parametrize("bos", ["auto", "always", "never"])
def test_a_conversation_has_the_start_token_of_our_own_chat_style(lm, bos, own):
    template = own + "after {{ messages[0].content }} comes :"
    found, ours = same_conversation(lm("LoRA"), word_tokenizer(TOY_WORDS, start=True, chat_template=template), bos)
    assert found == ours


def test_a_conversation_has_the_tokens_of_our_own_chat_style(lm, smollm2_tokenizer):
    found, ours = same_conversation(lm("LoRA"), smollm2_tokenizer, "auto")
    assert found == ours and len(ours[0]) > 5


# ---- memory ----------------------------------------------------------------------------------------------------------


def test_a_batch_that_does_not_fit_is_halved_until_it_does():
    sizes = []

    def work(batch):
        sizes.append(len(batch))
        if len(batch) > 2:
            raise torch.OutOfMemoryError("too much")
        return [2 * each for each in batch]

    assert halving([1, 2, 3, 4, 5], work) == [2, 4, 6, 8, 10] and sizes == [5, 2, 3, 1, 2]
    with pytest.raises(torch.OutOfMemoryError):
        halving([1], lambda batch: work([0, 0, 0]))
