"""Comparisons with a plain PEFT script and with options that are scored apart, on a tiny random base."""

import copy
from typing import Any

import pytest
import torch

from moe_peft.comparison import steps
from moe_peft.comparison.evaluation import APART, PACKED, PLAIN, compare_evaluation
from moe_peft.comparison.peft_script import FORMS
from moe_peft.comparison.steps import LORA, METHODS, compare_losses, compare_times, ratios
from moe_peft.data.module import MultitaskDataModule
from moe_peft.methods.lora import LoRA
from tests.data.toys import TOY_WORDS, choice_rows, word_tokenizer, write_task
from tests.tiny import LLAMA, tiny_backbone


@pytest.fixture
def backbone() -> Any:
    """A tiny random Llama that reads the toy tasks, and has the same weights whenever it is loaded."""
    backbone, tokenizer = tiny_backbone(), word_tokenizer(TOY_WORDS)
    backbone.shape = LLAMA | {"vocab_size": len(tokenizer)}
    backbone.tokenizer = lambda: tokenizer
    torch.manual_seed(0)
    model = backbone.load()
    backbone.load = lambda: copy.deepcopy(model)
    return backbone


@pytest.fixture(autouse=True)
def loud(monkeypatch) -> None:
    """A random base hardly notices small adapters."""
    monkeypatch.setattr(steps, "NOISE", 0.2)


@pytest.fixture
def data(tmp_path, make_task, backbone) -> MultitaskDataModule:
    """Two tasks, one of them with options of several lengths."""
    rows = choice_rows(60)
    for row in rows:
        row["choices"] = ["film " * (int(row["id"]) % 4) + "bad", "was good", "after comes film"]
    splits = {"train": rows[:40], "validation": rows[40:45], "test": rows[45:]}
    tasks = [str(make_task("one", train=40)), str(write_task(tmp_path / "two", splits, "multiple_choice"))]
    return MultitaskDataModule(tasks, backbone, batch_size=4, max_length=64)


def test_our_lora_has_the_losses_of_a_plain_peft_script(data, backbone):
    losses = compare_losses(data, backbone, backbone, steps=12, threads=1)
    assert list(losses) == [LORA, "PEFT, fp32, full", "PEFT, fp32, answers"]
    for ours, *theirs in zip(*losses.values(), strict=True):
        assert theirs == pytest.approx([ours] * 2, abs=1e-4)
    assert len(set(losses[LORA])) == 12, "every step sees another batch and other weights"


class Scaled(LoRA):
    """A LoRA that is not quite PEFT's."""

    def __init__(self, rank: int, alpha: float, **common: Any) -> None:
        super().__init__(rank=rank, alpha=1.5 * alpha, **common)


@pytest.mark.parametrize(
    ("method", "noise", "message"),
    [(Scaled, 0.2, "losses of PEFT, fp32, full and LoRA r=8 differ"), (LoRA, 0.0, "adapters do not move the loss")],
)
def test_a_lora_that_is_not_pefts_is_found(monkeypatch, data, backbone, method, noise, message):
    monkeypatch.setattr(steps, "NOISE", noise)
    monkeypatch.setitem(METHODS, LORA, METHODS[LORA]._replace(build=method))
    with pytest.raises(RuntimeError, match=message):
        compare_losses(data, backbone, backbone, steps=2, threads=1)


def test_all_methods_take_turns_with_all_forms_of_the_script(data, backbone):
    records = compare_times(data, backbone, backbone, list(METHODS), rounds=2, threads=1)
    assert set(records) == {*METHODS, *map(str, FORMS)}
    assert all(len(part) == 2 and min(part) > 0 for record in records.values() for part in record)
    assert ratios(records)[LORA][LORA] == 1


def test_options_score_alike_in_all_ways(data, backbone):
    found = compare_evaluation(data, backbone, "two", rows=7, rounds=2, threads=1)
    assert found.rows == 7 and found.options == 21
    assert 0 < found.differences[PACKED] < 1e-4 and found.differences[APART] < 1e-4
    assert len(found.seconds[PACKED]) == len(found.seconds[PLAIN]) >= 2


def test_a_task_that_there_is_not_is_refused(data, backbone):
    with pytest.raises(ValueError, match="task: 'three' is no task with options; use one of one, two"):
        compare_evaluation(data, backbone, "three", rows=7, rounds=1, threads=1)
