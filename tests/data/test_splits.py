from collections import Counter

import pytest

from moe_peft.data.splits import cut, drop_repeats, few_shot, halves, linked, stable_seed, subset
from moe_peft.data.tasks import TaskSpec

FRACTIONS = {"train": 0.7, "validation": 0.1, "test": 0.2}


def rows(count):
    return [{"id": str(i), "text": f"t{i}", "choices": ["a", "b"], "label": 0, "target": "a"} for i in range(count)]


def test_a_group_stays_in_one_split():
    groups = [str(i // 4) for i in range(200)]
    splits = cut(rows(200), groups, FRACTIONS, seed=0)
    where = {split: {int(row["id"]) // 4 for row in part} for split, part in splits.items()}
    assert where["train"].isdisjoint(where["test"] | where["validation"]) and where["test"].isdisjoint(
        where["validation"]
    )
    assert sum(len(part) for part in splits.values()) == 200


def test_shares_are_kept():
    sizes = {split: len(part) for split, part in cut(rows(1000), [str(i) for i in range(1000)], FRACTIONS, 0).items()}
    assert sizes == {"train": 700, "validation": 100, "test": 200}


def test_test_rows_do_not_move_when_the_other_shares_change():
    names = [str(i) for i in range(500)]
    one = cut(rows(500), names, FRACTIONS, 0)["test"]
    other = cut(rows(500), names, {"train": 0.5, "validation": 0.3, "test": 0.2}, 0)["test"]
    assert one == other


def test_stable_seed_is_the_same_in_every_process():
    # printf 'sst2\0train' | sha256sum | cut -c1-16
    assert stable_seed("sst2", "train") == 0x5237FAF84C5F7ECB


def test_a_repeat_stays_in_test_only():
    a, b, c = rows(3)
    splits = drop_repeats({"train": [a, b], "validation": [c, {**a, "id": "v"}], "test": [{**a, "id": "t"}]}, True)
    assert {split: [row["id"] for row in part] for split, part in splits.items()} == {
        "train": ["1"],
        "validation": ["2"],
        "test": ["t"],
    }


def test_contradicting_answers_are_dropped_everywhere():
    row = rows(1)[0]
    splits = drop_repeats({"train": [row], "test": [{**row, "id": "x", "label": 1, "target": "b"}]}, True)
    assert splits == {"train": [], "test": []}


def test_other_options_make_another_multiple_choice_example():
    row = rows(1)[0]
    other = {**row, "id": "x", "choices": ["a", "z"]}
    assert len(drop_repeats({"train": [row], "test": [other]}, True)["train"]) == 1
    assert len(drop_repeats({"train": [row], "test": [other]}, False)["train"]) == 0


def test_a_smaller_subset_lies_within_a_larger_one():
    small, large = (subset(rows(100), count, "toy", "train") for count in (10, 40))
    assert len(small) == 10 and all(row in large for row in small)
    assert [int(row["id"]) for row in large] == sorted(int(row["id"]) for row in large)
    assert small != rows(100)[:10]


def test_rows_without_answer_contradict_none_but_are_still_repeats():
    row = rows(1)[0]
    splits = drop_repeats({"train": [row], "test": [{**row, "id": "x", "label": None, "target": None}]}, True)
    assert [[kept["id"] for kept in part] for part in splits.values()] == [[], ["x"]]


def test_rows_that_share_a_text_directly_or_through_others_are_one_group():
    pairs = [("a", "b"), ("c", "d"), ("E  f", "g"), ("h", "A"), ("d", "e f"), ("i", "j")]
    sentences = [{"id": str(i), "text": one, "text_pair": two} for i, (one, two) in enumerate(pairs)]
    assert linked(sentences, ("text", "text_pair")) == ["0", "1", "1", "0", "1", "5"]
    assert linked(sentences, ("text",)) == ["0", "1", "2", "3", "4", "5"]
    assert linked([], ("text",)) == []


CLASSES = TaskSpec("toy", "classification", "accuracy", "{text}", ("a", "b", "c"))
CHOICES = TaskSpec("quiz", "multiple_choice", "accuracy", "{text}")


def labelled(count):
    """Rows of three classes; class b is in every second row, a and c in every fourth."""
    return [row | {"label": (0, 1, 2, 1)[i % 4]} for i, row in enumerate(rows(count))]


def ids(some):
    return [int(row["id"]) for row in some]


def test_shots_are_so_many_rows_of_every_class():
    taken = few_shot(CLASSES, labelled(80), 5, seed=0)
    assert Counter(row["label"] for row in taken) == {0: 5, 1: 5, 2: 5}
    assert ids(taken) == sorted(ids(taken)) != list(range(15))


def test_shots_of_a_task_without_classes_are_so_many_rows_in_all():
    assert len(few_shot(CHOICES, labelled(80), 7, seed=0)) == 7


def test_shots_follow_seed_and_task_and_fewer_lie_within_more():
    def draw(shots=4, seed=0, spec=CLASSES):
        return set(ids(few_shot(spec, labelled(80), shots, seed)))

    assert draw() == draw() and draw(3) < draw(9)
    other = TaskSpec("other", "classification", "accuracy", "{text}", ("a", "b", "c"))
    assert draw() != draw(seed=1) and draw() != draw(spec=other)


@pytest.mark.parametrize(
    ("spec", "shots", "telling"),
    [(CLASSES, 3, "'toy': shots=3, but class 'a' has 2 "), (CHOICES, 9, "'quiz': shots=9, but there are 8 ")],
)
def test_too_few_rows_for_the_shots_are_one_clear_line(spec, shots, telling):
    with pytest.raises(ValueError) as error:
        few_shot(spec, labelled(8), shots, seed=0)
    assert telling in str(error.value) and "\n" not in str(error.value)


def test_a_class_without_rows_has_too_few():
    with pytest.raises(ValueError, match="class 'c' has 0"):
        few_shot(CLASSES, labelled(80)[:2], 1, seed=0)


def test_halves_share_no_row_and_leave_none_out():
    # torch.randperm(7) under seed 1189 is 0 5 2 | 1 6 4 3
    assert halves(7, 1189) == ([0, 2, 5], [1, 3, 4, 6])
    assert halves(8, 1) != halves(8, 2)
