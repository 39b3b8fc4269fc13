"""Scores of options: the packed form against one sequence per option; the loss against a hand-written one."""

import pytest
import torch
from torch.nn.functional import log_softmax

from moe_peft.backbones import CausalLM
from moe_peft.batch import Batch
from moe_peft.data.collate import Collator
from moe_peft.data.encoding import EncodedRow
from moe_peft.methods.evaluation import predict_rows
from moe_peft.methods.lora import LoRA
from moe_peft.methods.scoring import answer_nll
from moe_peft.methods.trex import TRex
from moe_peft.quirks import BLOCK_MASKED
from tests.tiny import LLAMA, build, fit_prior, random_batch, randomise


def encoded(name: str, prompt: list[int], options: list[list[int]]) -> EncodedRow:
    row = {"id": name, "text": "t", "choices": [str(option) for option in options], "label": 0, "target": "x"}
    return EncodedRow(
        task_id=0,
        row_id=f"tone/{name}",
        text="t",
        prompt=prompt,
        answer=options[0],
        options=options,
        target=0,
        row=row,
        truncated=0,
    )


ROWS = [
    encoded("a", [5, 6, 7, 8, 9, 10], [[11], [12, 13, 14]]),
    encoded("b", [20, 21], [[30, 31], [32], [33, 34, 35, 36]]),
    encoded("c", [40, 41, 42], [[50], [51]]),
]


def flat_score(module, prompt: list[int], option: list[int]) -> float:
    """Plain form: one sequence, full logits, fp32 log-softmax."""
    ids = torch.tensor([prompt + option])
    mask = torch.ones_like(ids)
    prompt_mask = torch.tensor([[True] * len(prompt) + [False] * len(option)])
    module.begin(Batch(input_ids=ids, attention_mask=mask, prompt_mask=prompt_mask, task_id=torch.zeros(1).long()))
    logits = module.model(input_ids=ids, attention_mask=mask).logits[0]
    at = torch.arange(len(prompt), ids.shape[1])
    return log_softmax(logits, -1)[at - 1, ids[0, at]].sum().item()


@pytest.mark.parametrize("method", [LoRA, TRex])
@torch.no_grad()
def test_packed_options_score_as_their_own_sequences(method):
    module = build(method)
    if module.prior is not None:
        fit_prior(module)
    untouched = predict_rows(module, Collator("causal", 0).evaluate(ROWS))
    randomise(module)
    packed = predict_rows(module.eval(), Collator("causal", 0).evaluate(ROWS))
    for row, prediction, before in zip(ROWS, packed, untouched, strict=True):
        flat = [flat_score(module, row.prompt, option) for option in row.options]
        assert prediction.scores == pytest.approx(flat, abs=1e-5)
        assert prediction.scores != pytest.approx(before.scores, abs=1e-3)


OWN_SHAPES = {
    "opt": {"word_embed_proj_dim": 32, "ffn_dim": 48},
    "gemma": {"head_dim": 8},
    "gemma2": {"head_dim": 8},
    "gemma3_text": {"head_dim": 8},
}


@torch.no_grad()
def packing_error(model_type: str, **shape) -> float:
    """Largest difference between packed scores and those of one sequence per option, on a tiny random model."""
    shape = LLAMA | {"model_type": model_type} | OWN_SHAPES.get(model_type, {}) | shape
    module = build(LoRA, backbone=CausalLM(model_type, dtype="float32", shape=shape, random_weights=True))
    randomise(module)
    packed = predict_rows(module.eval(), Collator("causal", 0).evaluate(ROWS))
    pairs = [
        (flat_score(module, row.prompt, o), s)
        for row, p in zip(ROWS, packed, strict=True)
        for o, s in zip(row.options, p.scores, strict=True)
    ]
    return max(abs(flat - score) for flat, score in pairs)


@pytest.mark.parametrize("model_type", sorted(BLOCK_MASKED))
def test_every_packable_model_type_scores_packed_options_as_their_own_sequences(model_type):
    assert packing_error(model_type) < 1e-5


def test_a_window_that_rows_outgrow_is_why_such_models_do_not_pack():
    assert packing_error("mistral", sliding_window=4) > 1e-3


@torch.no_grad()
def test_seq2seq_options_score_as_their_own_sequences():
    module = build(LoRA, "seq2seq")
    randomise(module)
    predictions = predict_rows(module.eval(), Collator("seq2seq", 0).evaluate(ROWS))
    for row, prediction in zip(ROWS, predictions, strict=True):
        for option, score in zip(row.options, prediction.scores, strict=True):
            ids = torch.tensor([row.prompt])
            module.context.begin(ids, torch.ones_like(ids))
            logits = module.model(input_ids=ids, labels=torch.tensor([option])).logits[0]
            plain = log_softmax(logits, -1)[torch.arange(len(option)), torch.tensor(option)].sum()
            assert score == pytest.approx(plain.item(), abs=1e-5)


def test_answer_loss_is_the_models_own_loss_per_row():
    module = build(LoRA)
    randomise(module)
    batch = random_batch(rows=3)
    module.begin(batch)
    nll = answer_nll(module.backbone, module.model, batch).sum(1) / (batch["labels"] != -100).sum(1)
    for i in range(3):
        real = batch["attention_mask"][i].bool()
        own = {"input_ids": batch["input_ids"][i : i + 1, real], "labels": batch["labels"][i : i + 1, real]}
        with module.context.disabled():
            bare = module.model(**own).loss
        module.context.begin(own["input_ids"], torch.ones_like(own["input_ids"]))
        assert nll[i].item() == pytest.approx(module.model(**own).loss.item(), abs=1e-5)
        assert abs(nll[i].item() - bare.item()) > 1e-3


def seen_by_the_head(module, run):
    """The shapes that the output head is given while something runs; all contiguous."""
    seen = []
    hook = module.model.lm_head.register_forward_pre_hook(lambda head, args: seen.append(args[0]))
    run()
    hook.remove()
    # A sliced input makes torch copy the vocabulary matrix once per row: slow, and gigabytes in evaluation.
    assert all(hidden.is_contiguous() for hidden in seen)
    return [tuple(hidden.shape) for hidden in seen]


def test_the_output_head_is_computed_where_an_answer_is_predicted_and_nowhere_else():
    module = build(LoRA)
    batch = random_batch(rows=3)
    answers = (batch["labels"] != -100).sum(1)
    assert len(set(answers.tolist())) > 1, "answers of one length would not tell"
    assert seen_by_the_head(module, lambda: module(batch)) == [(1, int(answers.sum()), 32)]
    options = sum(len(option) for row in ROWS for option in row.options)
    packed = Collator("causal", 0).evaluate(ROWS)
    assert seen_by_the_head(module, lambda: predict_rows(module, packed)) == [(1, options, 32)]


def test_afterwards_the_model_gives_all_its_logits_again():
    module = build(LoRA)
    module(random_batch(rows=3))
    ids = torch.arange(3, 13).view(2, 5)
    with module.context.disabled():
        assert seen_by_the_head(module, lambda: module.model(input_ids=ids)) == [(2, 5, 32)]


def test_another_number_of_answer_tokens_asks_for_no_compilation_of_its_own():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    module = build(LoRA)
    module.model.compile(backend="eager")
    graphs = []
    for seed in range(8):
        batch = random_batch(rows=3)
        batch["labels"] = batch["labels"].clone()
        for row in range(3):
            answer = (batch["labels"][row] != -100).nonzero()[:, 0]
            batch["labels"][row, answer[: (seed >> row) % 2 and len(answer) - 1]] = -100
        module(batch)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[0] >= 1 and graphs[-1] - graphs[0] <= 3, "of 8 numbers; one graph for all follows a few of their own"
