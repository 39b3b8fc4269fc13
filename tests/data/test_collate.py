import pytest
import torch

from moe_peft.batch import content_key
from moe_peft.data.collate import Collator
from moe_peft.data.encoding import EncodedRow

PAD = 9
END = 9  # as in SmolLM2, the end token doubles as padding


def row(name, prompt, answer, options=(), target=0, task_id=0):
    plain = {"id": name, "text": name, "choices": ["x" * (k + 1) for k in range(len(options))], "label": target}
    return EncodedRow(f"toy/{name}", task_id, plain, f"text {name}", prompt, answer, list(options), target, 0)


SHORT = row("a", [5], [7, END], [[7], [8, 8]])
LONG = row("b", [1, 2, 3], [4, 4, 4, END], [[4, 4, 4], [6], [6, 6]], target=2)


def test_causal_training_batch_by_hand():
    batch = Collator("causal", PAD).train([SHORT, LONG], 2.0, 6.0)
    assert batch["input_ids"].tolist() == [[9, 9, 9, 9, 5, 7, 9], [1, 2, 3, 4, 4, 4, 9]]
    assert batch["attention_mask"].tolist() == [[0, 0, 0, 0, 1, 1, 1], [1] * 7]
    assert batch["prompt_mask"].tolist() == [[False] * 4 + [True, False, False], [True] * 3 + [False] * 4]
    assert batch["labels"].tolist() == [[-100] * 5 + [7, END], [-100, -100, -100, 4, 4, 4, END]]
    assert (batch["rows_share"], batch["tokens_share"]) == (2.0, 6.0)
    assert batch["row_id"] == ["toy/a", "toy/b"] and batch["text"] == ["text a", "text b"]


@pytest.mark.parametrize("kind", ["causal", "seq2seq", "classifier"])
def test_task_shares_stay_with_their_rows(kind):
    batch = Collator(kind, PAD).train([SHORT, LONG], 2.0, 2.0, [0.5, 1.5])
    assert batch["task_share"].tolist() == [0.5, 1.5] and batch["task_share"].dtype == torch.float32


def test_seq2seq_training_batch_by_hand():
    batch = Collator("seq2seq", PAD).train([SHORT, LONG], 2.0, 6.0)
    assert batch["input_ids"].tolist() == [[5, 9, 9], [1, 2, 3]]
    assert batch["attention_mask"].tolist() == [[1, 0, 0], [1, 1, 1]]
    assert batch["prompt_mask"].tolist() == [[True, False, False], [True] * 3]
    assert batch["labels"].tolist() == [[7, END, -100, -100], [4, 4, 4, END]]


def test_classifier_training_batch_by_hand():
    batch = Collator("classifier", PAD).train([SHORT, LONG], 2.0, 2.0)
    assert batch["input_ids"].tolist() == [[5, 9, 9], [1, 2, 3]]
    assert batch["target"].tolist() == [0, 2] and batch["target"].dtype == torch.int64
    assert "labels" not in batch


def test_values_make_float_targets():
    batch = Collator("classifier", PAD).train([row("a", [1], [], target=0.5), row("b", [1], [], target=1)], 2.0, 2.0)
    assert batch["target"].tolist() == [0.5, 1.0] and batch["target"].dtype == torch.float32


def test_classifier_refuses_a_text_answer():
    with pytest.raises(ValueError, match="'toy/a' has a text answer"):
        Collator("classifier", PAD).train([row("a", [1], [], target=None)], 1.0, 1.0)


def test_causal_evaluation_lays_options_side_by_side_without_end_token():
    batch = Collator("causal", PAD).evaluate([SHORT, LONG])
    assert batch["input_ids"].tolist() == [[9, 9, 9, 9, 9, 5, 7, 8, 8], [1, 2, 3, 4, 4, 4, 6, 6, 6]]
    assert batch["option_of"].tolist() == [[0, 0, 0, 0, 0, 0, 1, 2, 2], [0, 0, 0, 1, 1, 1, 2, 3, 3]]
    assert batch["prompt_mask"].sum(1).tolist() == [1, 3]
    assert batch["row_id"] == ["toy/a", "toy/b"]
    assert [plain["id"] for plain in batch["rows"]] == ["a", "b"]


def test_unpacked_causal_evaluation_has_one_sequence_per_option():
    batch = Collator("causal", PAD, pack=False).evaluate([SHORT, LONG])
    assert batch["input_ids"].tolist() == [
        [9, 9, 9, 9, 5, 7],
        [9, 9, 9, 5, 8, 8],
        [1, 2, 3, 4, 4, 4],
        [9, 9, 1, 2, 3, 6],
        [9, 1, 2, 3, 6, 6],
    ]
    assert [[label for label in row if label != -100] for row in batch["labels"].tolist()] == [
        [7],
        [8, 8],
        [4, 4, 4],
        [6],
        [6, 6],
    ]
    assert batch["labels"][:, -1].tolist() == [7, 8, 4, 6, 6] and "option_of" not in batch
    assert batch["row_id"] == ["toy/a"] * 2 + ["toy/b"] * 3 and len(batch["rows"]) == 2


def test_seq2seq_evaluation_repeats_the_prompt():
    batch = Collator("seq2seq", PAD).evaluate([SHORT])
    assert batch["input_ids"].tolist() == [[5], [5]]
    assert batch["labels"].tolist() == [[7, -100], [8, 8]]


@pytest.mark.parametrize(("kind", "rows"), [("classifier", 2), ("causal", 2)])
def test_evaluation_without_options_has_one_prompt_per_row(kind, rows):
    batch = Collator(kind, PAD).evaluate([row("a", [1], []), row("b", [1, 2], [])])
    assert len(batch["input_ids"]) == rows == len(batch["rows"])
    assert "labels" not in batch and "option_of" not in batch
    assert ("target" in batch) == (kind == "classifier")


def test_classifier_evaluation_of_an_unlabelled_row_has_no_target():
    batch = Collator("classifier", PAD).evaluate([row("a", [1], []), row("b", [1], [], target=None)])
    assert "target" not in batch and len(batch["rows"]) == 2


def test_evaluation_of_two_tasks_in_one_batch_is_refused():
    with pytest.raises(ValueError, match="one task"):
        Collator("causal", PAD).evaluate([SHORT, row("c", [1], [2], [[2], [3]], task_id=1)])


def test_prompts_alone_have_no_answer():
    batch = Collator("causal", PAD).prompts([SHORT, LONG])
    assert batch["input_ids"].tolist() == [[9, 9, 5], [1, 2, 3]]
    assert batch["prompt_mask"].tolist() == [[False, False, True], [True] * 3]
    assert "labels" not in batch and batch["text"] == ["text a", "text b"]


def test_a_row_has_the_same_content_whatever_its_batch_mates():
    collator = Collator("causal", PAD)
    alone, together = collator.prompts([SHORT]), collator.prompts([SHORT, LONG])
    keys = [content_key(batch["input_ids"], batch["attention_mask"])[0] for batch in (alone, together)]
    assert keys[0] == keys[1]
