"""lm-eval asks a trained adapter, and its numbers are those of the package's own test, row by row."""

import pytest
import torch

from moe_peft.interop.adapter_folder import write_adapter
from moe_peft.metrics import score_row
from tests.interop.tiny_lm_eval import (
    CASES,
    METHODS,
    PROMPTS,
    SERVED,
    MoePeftLM,
    ask,
    backbones,
    folders,
    lm,
    offline,
    predictions,
    results,
    run,
    samples,
    tasks,
)
from tests.tiny_checkpoints import save, trained

FIXTURES = (backbones, folders, lm, offline, tasks)


@pytest.mark.parametrize(("method", "kind"), CASES)
def test_the_command_scores_every_row_as_our_own_test(backbones, folders, tasks, tmp_path, monkeypatch, method, kind):
    module = trained(backbones[kind], method, kind, **METHODS[method])
    file = save(module, tmp_path / "run" / "checkpoints" / "last.ckpt")
    given = ["--model_args", f"adapter={file},max_length=40,tasks={SERVED}", "--batch_size", "5"]
    run(monkeypatch, "run", "--model", "moe_peft", *given, "--tasks", *tasks.values(), "-s", "-o", tmp_path / "out")
    ours = predictions(module, folders, max_length=40, eval_batch_size=7)
    with module.context.disabled():
        base = predictions(module, folders, max_length=40)
    found, moved = results(tmp_path / "out"), []
    for task in folders:
        rows = samples(tmp_path / "out", task)
        assert len(rows) == 14
        for row in rows:
            own = ours[f"{task}/{row['doc']['id']}"]
            scores = [float(score) for ((score, _),) in row["resps"]]
            assert scores == pytest.approx(own.scores, abs=1e-5)
            assert row["acc"] == (own.choice("sum") == own.label)
            assert row["acc_norm"] == (own.choice("per_char") == own.label)
            moved.append(own.choice("sum") != base[own.row_id].choice("sum"))
    for metric, ranking in (("acc,none", "sum"), ("acc_norm,none", "per_char")):
        scored = score_row(module.specs, list(ours.values()), ranking).tasks
        assert [found[task][metric] for task in folders] == [score.value for score in scored.values()]
    assert any(moved), "the adapter changes no answer"


@pytest.mark.parametrize("method", ["TRex", "TTLoRAMoE"])
def test_batches_of_one_size_give_the_same_bits(backbones, folders, tasks, tmp_path, monkeypatch, method):
    module = trained(backbones["causal"], method, dtype="bfloat16", **METHODS[method])
    file = save(module, tmp_path / "run.ckpt")
    given = ["--model_args", f"adapter={file},tasks={SERVED}", "--batch_size", "8", "--tasks", *tasks.values()]
    run(monkeypatch, "run", "--model", "moe_peft", *given, "-s", "-o", tmp_path / "out")
    ours = predictions(module, folders, max_length=128, eval_batch_size=8)
    for task in folders:
        for row in samples(tmp_path / "out", task):
            found = tuple(float(score) for ((score, _),) in row["resps"])
            assert found == ours[f"{task}/{row['doc']['id']}"].scores


def test_an_exported_adapter_answers_as_its_checkpoint(lm, tmp_path):
    model = lm("TRex")
    write_adapter(model.module, tmp_path / "adapter")
    asked = [("film was good :", " positive"), ("film was good :", " negative")]
    assert ask(MoePeftLM(str(tmp_path / "adapter")), "tone", *asked) == ask(model, "tone", *asked)


@pytest.mark.parametrize("kind", ["causal", "seq2seq"])
def test_greedy_says_whether_decoding_would_give_the_continuation(lm, kind):
    model = lm("MoRE", kind)
    how = {"until": [], "max_gen_toks": 3, "do_sample": False}
    (text,) = ask(model, "tone", (PROMPTS[0], how), kind="generate_until")
    words = text.split()
    other = " ".join([*words[:2], "good" if words[2] != "good" else "bad"])
    asked = [
        (PROMPTS[0], f" {own}") for own in (" ".join(words), other, words[0], "good" if words[0] != "good" else "bad")
    ]
    assert [greedy for _, greedy in ask(model, "tone", *asked)] == [True, False, True, False]


def whole_text(model, tokens):
    """Log-likelihood of tokens, each given all before it."""
    ids = torch.tensor([tokens])
    model.module.begin({"input_ids": ids, "attention_mask": torch.ones_like(ids), "task_id": torch.tensor([0])})
    with torch.no_grad():
        scores = model.module.model(input_ids=ids).logits.log_softmax(-1)
    return scores[0, :-1].gather(1, ids[0, 1:, None]).sum().item()


@pytest.mark.parametrize("method", ["LoRA", "MoRE"])
def test_a_whole_text_is_scored_token_by_token(lm, method):
    text = "film was good film was bad after 4 comes one two three"
    model = lm(method)
    tokens = model.tokenizer(text)["input_ids"]
    (found,) = ask(model, "tone", (text,), kind="loglikelihood_rolling")
    assert found == pytest.approx(whole_text(model, [1, *tokens]), abs=1e-4)
    (cut,) = ask(lm(method, max_length=8), "tone", (text,), kind="loglikelihood_rolling")
    # Seven tokens fit behind the start token; the last five see two of those seven.
    parts = [whole_text(model, [1, *tokens[:7]]), whole_text(model, tokens[4:]) - whole_text(model, tokens[4:7])]
    assert cut == pytest.approx(sum(parts), abs=1e-4) and abs(cut - found) > 1e-3
