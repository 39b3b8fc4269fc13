import gzip
import json
from collections import Counter
from pathlib import Path

import pytest

from moe_peft.data.sources import TaskFolder, TaskSource
from moe_peft.data.tasks import SPLITS
from tests.data.toys import choice_rows, class_rows, write_task


def test_folder_gives_spec_and_completed_rows(make_task):
    source = TaskFolder(str(make_task("toy", train=6)))
    assert source.spec().name == "toy"
    assert source.spec().choices == ("negative", "positive")
    row = source.rows("train")[1]
    assert (row["id"], row["target"], row["text_pair"], row["keyword"]) == ("1", "positive", "", "")
    assert source.note == ""


def test_gzipped_split_is_read(make_task):
    folder = make_task("toy", train=6)
    plain = folder / "train.jsonl"
    with gzip.open(folder / "train.jsonl.gz", "wt") as file:
        file.write(plain.read_text())
    plain.unlink()
    assert len(TaskFolder(str(folder)).rows("train")) == 6


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_missing_split_is_named_where_it_is_required(make_task, split):
    folder = make_task("toy")
    (folder / f"{split}.jsonl").unlink()
    source = TaskFolder(str(folder))
    source.require([other for other in SPLITS if other != split])
    for read in (lambda: source.require(SPLITS), lambda: source.rows(split)):
        with pytest.raises(ValueError, match=f"has no {split}.jsonl or {split}.jsonl.gz; add"):
            read()


def bare(rows, *columns):
    return [{name: value for name, value in row.items() if name not in columns} for row in rows]


def test_rows_without_answers_are_for_prediction_only(tmp_path):
    rows = bare(class_rows(3), "label", "choices")
    folder = write_task(tmp_path / "films", {"train": class_rows(2), "test": rows})
    source = TaskFolder(str(folder))
    found = source.rows("test", labelled=False)
    assert [(row["label"], row["choices"]) for row in found] == [(None, ["negative", "positive"])] * 3
    assert all("target" not in row for row in found)
    with pytest.raises(ValueError, match="'films', test row '0': choices None"):
        source.rows("test")


def test_a_row_with_choices_still_needs_its_label_outside_prediction(tmp_path):
    folder = write_task(tmp_path / "films", {"train": class_rows(2), "test": bare(class_rows(3), "label")})
    with pytest.raises(ValueError, match="test row '0': the label is missing"):
        TaskFolder(str(folder)).rows("test")


def test_multiple_choice_needs_its_choices_even_for_prediction(tmp_path):
    folder = write_task(tmp_path / "quiz", {"test": bare(choice_rows(3), "choices", "label")}, "multiple_choice")
    with pytest.raises(ValueError, match="choices None are no list"):
        TaskFolder(str(folder)).rows("test", labelled=False)


def test_a_wrong_label_is_refused_even_for_prediction(tmp_path):
    rows = class_rows(3)
    rows[1]["label"] = 2
    folder = write_task(tmp_path / "films", {"test": rows})
    with pytest.raises(ValueError, match="label 2 is outside"):
        TaskFolder(str(folder)).rows("test", labelled=False)


@pytest.mark.parametrize(("kind", "metric"), [("regression", "pearson"), ("generation", "exact_match")])
def test_numbers_and_texts_may_be_unknown_for_prediction(tmp_path, kind, metric):
    folder = write_task(tmp_path / "open", {"test": [{"id": "1", "text": "film"}]}, kind, metric=metric)
    assert TaskFolder(str(folder), max_words=5).rows("test", labelled=False)[0]["text"] == "film"
    with pytest.raises(ValueError, match="'1': (value|target) None"):
        TaskFolder(str(folder)).rows("test")


def test_label_names_may_stand_in_the_description(tmp_path):
    folder = write_task(tmp_path / "films", {"test": bare(class_rows(3), "label", "choices")})
    description = json.loads((folder / "task.json").read_text())
    (folder / "task.json").write_text(json.dumps(description | {"choices": ["negative", "positive"]}))
    assert TaskFolder(str(folder)).rows("test", labelled=False)[2]["choices"] == ["negative", "positive"]
    (folder / "task.json").write_text(json.dumps(description | {"choices": "negative, positive"}))
    with pytest.raises(ValueError, match="choices 'negative, positive'; give the label names as a list"):
        TaskFolder(str(folder)).spec()


def test_missing_folder_is_named(tmp_path):
    with pytest.raises(ValueError, match="'.*nowhere' does not exist"):
        TaskFolder(str(tmp_path / "nowhere")).spec()


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_bad_task_json_is_named(make_task, text):
    folder = make_task("toy")
    (folder / "task.json").write_text(text)
    with pytest.raises(ValueError, match="task.json'.*(correct it|add it)"):
        TaskFolder(str(folder)).spec()


def test_broken_line_is_named_by_number(make_task):
    folder = make_task("toy", train=3)
    with (folder / "train.jsonl").open("a") as file:
        file.write("{not json\n")
    with pytest.raises(ValueError, match="train.jsonl' line 4 "):
        TaskFolder(str(folder)).rows("train")


def test_truncated_gzip_is_named(make_task):
    folder = make_task("toy")
    (folder / "test.jsonl").unlink()
    (folder / "test.jsonl.gz").write_bytes(gzip.compress(b'{"id": "1"}\n' * 999)[:-20])
    with pytest.raises(ValueError, match="test.jsonl.gz' is damaged"):
        TaskFolder(str(folder)).rows("test")


def test_caps_take_a_fixed_random_subset(make_task):
    folder = str(make_task("toy", train=50))
    once, again = (TaskFolder(folder, train_rows=10).rows("train") for _ in range(2))
    assert len(once) == 10 and once == again
    assert once != TaskFolder(folder).rows("train")[:10]
    assert len(TaskFolder(folder, test_rows=3).rows("test")) == 3


def test_template_and_metric_can_be_replaced(make_task):
    spec = TaskFolder(str(make_task("toy")), template="{text}?", metric="f1").spec()
    assert (spec.template, spec.metric) == ("{text}?", "f1")


def test_max_words_counts_prompt_and_longest_option(tmp_path):
    rows = choice_rows(2)
    rows[1]["choices"][2] = "a longer option"  # 3 words of prompt and 3 of option
    folder = str(
        write_task(tmp_path / "quiz", dict.fromkeys(("train", "validation", "test"), rows), "multiple_choice", "{text}")
    )
    assert [row["id"] for row in TaskFolder(folder, max_words=5).rows("train")] == ["0"]
    assert [row["id"] for row in TaskFolder(folder, max_words=6).rows("train")] == ["0", "1"]
    with pytest.raises(ValueError, match="max_words=3 leaves no train rows"):
        TaskFolder(folder, max_words=3).rows("train")


def test_rows_with_equal_options_are_dropped_on_demand(tmp_path):
    rows = choice_rows(3)
    rows[1]["choices"] = ["1", "2", "1"]
    folder = str(write_task(tmp_path / "quiz", dict.fromkeys(("train", "validation", "test"), rows), "multiple_choice"))
    assert [row["id"] for row in TaskFolder(folder, equal_options="drop").rows("test")] == ["0", "2"]
    with pytest.raises(ValueError, match="equal"):
        TaskFolder(folder).rows("test")


@pytest.mark.parametrize(
    ("arguments", "telling"),
    [
        ({"test_rows": 0}, "test_rows=0"),
        ({"shots": 0}, "shots=0"),
        ({"shots_seed": -1}, "shots_seed=-1 must not be negative"),
        ({"shots": 2, "train_rows": 9}, "shots=2 and train_rows=9 both limit"),
    ],
)
def test_limits_that_make_no_sense_are_refused(make_task, arguments, telling):
    with pytest.raises(ValueError, match=telling):
        TaskFolder(str(make_task("toy")), **arguments)


def test_shots_limit_training_rows_alone(make_task):
    folder = str(make_task("toy", train=40))
    source = TaskFolder(folder, shots=3)
    assert Counter(row["label"] for row in source.rows("train")) == {0: 3, 1: 3}
    assert (len(source.rows("validation")), len(source.rows("test"))) == (5, 7)
    assert source.rows("train") != TaskFolder(folder, shots=3, shots_seed=1).rows("train")


def test_shots_are_drawn_from_rows_that_max_words_keeps(tmp_path):
    rows = class_rows(40)
    for row in rows[:30]:
        row["text"] += " and long"
    folder = write_task(tmp_path / "films", {"train": rows})
    taken = TaskFolder(str(folder), shots=5, max_words=6).rows("train")
    assert sorted(int(row["id"]) for row in taken) == list(range(30, 40))


def test_a_relative_folder_lies_under_the_root_and_an_absolute_one_where_it_is(make_task, tmp_path):
    folder = make_task("toy", train=6)
    assert TaskFolder("toy", train_rows=2).under(tmp_path).spec().name == "toy"
    assert len(TaskFolder("toy", train_rows=2).under(tmp_path).rows("train")) == 2
    assert TaskFolder(str(folder)).under(Path("/nowhere")).spec().name == "toy"


def test_a_source_moved_under_two_roots_reads_both(tmp_path):
    source = TaskFolder("toy")
    for root, count in (("a", 3), ("b", 5)):
        write_task(tmp_path / root / "toy", {"train": class_rows(count)})
        assert len(source.under(tmp_path / root).rows("train")) == count


def test_a_source_of_ones_own_needs_two_methods():
    class Mine(TaskSource):
        def _read_spec(self):
            from moe_peft.data.tasks import TaskSpec

            return TaskSpec("mine", "classification", "accuracy", "{text}", ("negative", "positive"))

        def _read_rows(self, split):
            return class_rows(4)

    assert len(Mine(train_rows=2).rows("train")) == 2


def test_all_real_task_folders_load(data_root):
    sources = [
        TaskFolder(str(folder), equal_options="drop") for folder in sorted(data_root.iterdir()) if folder.is_dir()
    ]
    assert len(sources) == 22
    for source in sources:
        assert min(len(source.rows(split)) for split in ("train", "validation", "test")) > 100
