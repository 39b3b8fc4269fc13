"""Task folders as lm-eval's tasks: the tool, the templates, the metrics."""

import re

import pytest
import yaml

from moe_peft.data.sources import TaskFolder
from moe_peft.data.tasks import TaskSpec
from moe_peft.metrics import normalise_answer, score_task
from moe_peft.predictions import Prediction
from tests.data.toys import class_rows, write_task
from tests.interop.tiny_lm_eval import offline, task_config
from tests.tiny_runs import text_rows, value_rows

FIXTURES = (offline,)
TEMPLATES = [
    "{text}\nQuestion: {text_pair}?\nAnswer:",
    "{{{text}}} {{% if %}} {{{{ text }}}} {{# {keyword}",
    "{text}",
    " {text}\n",
    "Does \"{text}\" 'hold'? é \\n",
]


def loaded(folder):
    """The task of a folder, as lm-eval reads it."""
    from lm_eval.api.task import ConfigurableTask

    return ConfigurableTask(config=task_config(TaskFolder(str(folder)), "test"))


@pytest.mark.parametrize("template", TEMPLATES)
def test_lm_eval_writes_our_own_prompts(tmp_path, template):
    rows = [{**row, "text": f"{{{{ {at} }}}} {{% x %}} é"} for at, row in enumerate(class_rows(3))]
    rows[1] |= {"text_pair": "a pair", "keyword": "key"}
    rows[2] |= {"text": "7"}
    source = TaskFolder(str(write_task(tmp_path / "t", {"test": rows}, template=template)))
    task = loaded(source.path)
    ours = [template.format_map(row) for row in source.rows("test")]
    assert [task.doc_to_text(row) for row in task.test_docs()] == ours


@pytest.mark.parametrize("metric", ["matthews", "accuracy/f1"])
def test_metrics_of_classes_are_ours(tmp_path, metric):
    task = loaded(write_task(tmp_path / "t", {"test": class_rows(9)}, metric=metric))
    predictions, found = [], {}
    for at, row in enumerate(task.test_docs()):
        scores = ((-1.0, -2.0), (-2.0, -1.0), (-1.0, -1.5))[at % 3]
        predictions.append(Prediction(f"t/{row['id']}", 0, row["label"], None, None, scores, (8, 8), None, None))
        for name, value in task.process_results(row, [(score, False) for score in scores]).items():
            found.setdefault(name, []).append(value)
    ours = score_task(TaskSpec("t", "classification", metric, "{text}", ("negative", "positive")), predictions, "sum")
    values = {name: task.aggregation()[name](values) for name, values in found.items()}
    if metric == "matthews":
        assert values["mcc"] == pytest.approx(ours.value)
    else:
        assert values["acc"] == ours.value and values["f1"] == pytest.approx(ours.beside["f1"])
    assert 0 < ours.value < 1


def test_f1_of_more_classes_is_not_lm_eval_s(tmp_path):
    rows = [row | {"choices": ["a", "b", "c"]} for row in class_rows(4)]
    config = task_config(TaskFolder(str(write_task(tmp_path / "t", {"test": rows}, metric="f1"))), "test")
    assert [metric["metric"] for metric in config["metric_list"]] == ["acc", "acc_norm"]


TEXTS = [
    "one two",
    " One,  two.\n",
    "The one two",
    "a",
    "",
    "-5",
    "5",
    "3.5",
    "(one) two",
    "one the two",
    "one two three",
]


def test_texts_are_compared_as_ours(tmp_path):
    rows = [row | {"target": text or "x"} for row, text in zip(text_rows(len(TEXTS)), TEXTS, strict=True)]
    task = loaded(write_task(tmp_path / "t", {"test": rows}, "generation", metric="exact_match"))
    pairs = [(row, text) for row in task.test_docs() for text in TEXTS]
    found = [bool(task.process_results(row, [text])["exact_match"]) for row, text in pairs]
    ours = [normalise_answer(row["target"]) == normalise_answer(text) for row, text in pairs]
    assert found == ours and 0 < sum(ours) < len(ours) and task.config.generation_kwargs["until"] == []


def test_the_tool_writes_a_file_per_task_and_copies_no_rows(tmp_path, run_tool):
    rows = class_rows(5)
    rows[2]["choices"] = ["same", "same"]
    folders = [
        write_task(tmp_path / "a", {"validation": class_rows(4)}),
        write_task(tmp_path / "b", {"validation": rows}, "multiple_choice", name="b/c"),
    ]
    status, lines, errors = run_tool("lm_eval_task", *folders, "--out", tmp_path / "out", "--split", "validation")
    assert status == 0 and not errors
    assert lines == [
        f"{tmp_path / 'out' / 'a.yaml'}: 4 rows of {folders[0] / 'validation.jsonl'}",
        f"{tmp_path / 'out' / 'b_c.yaml'}: 5 rows of {folders[1] / 'validation.jsonl'}; 1 with two equal options, "
        "which `equal_options: drop` leaves out",
    ]
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["a.yaml", "b_c.yaml"]
    config = yaml.safe_load((tmp_path / "out" / "b_c.yaml").read_text())
    assert config["task"] == "b/c" and config["test_split"] == "validation"
    assert config["dataset_kwargs"] == {"data_files": {"validation": str(folders[1] / "validation.jsonl")}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"folder": "gone"}, "task folder '.*gone' does not exist"),
        ({"split": "train"}, "has no train.jsonl"),
        (
            {"template": "{text:>9}"},
            r"template '\{text:>9\}' formats \{text\}, which has no like in Jinja",
        ),
        ({"name": "b"}, "two folders hold a task of which 'b.yaml' would be written; leave one out"),
        ({"name": "a/b", "other": "a_b"}, "two folders hold a task of which 'a_b.yaml' would be written; leave"),
        ({"out": "a"}, "out: '.*a' exists and is not an empty folder"),
        ({"kind": "regression", "metric": "pearson", "rows": value_rows(3)}, "task 'a' asks for numbers"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(tmp_path, run_tool, change, message):
    given = {"kind": "classification", "metric": "accuracy", "template": "{text} :", "name": "a"} | change
    task = {name: given[name] for name in ("template", "metric", "name")}
    write_task(tmp_path / "a", {"test": given.get("rows", class_rows(3))}, given["kind"], **task)
    write_task(tmp_path / "b", {"test": class_rows(3)}, name=given.get("other", "b"))
    before = sorted(tmp_path.rglob("*"))
    folders = [tmp_path / given.get("folder", "a"), tmp_path / "b"]
    out, split = tmp_path / given.get("out", "out"), given.get("split", "test")
    status, lines, errors = run_tool("lm_eval_task", *folders, "--out", out, "--split", split)
    assert status == 2 and not lines and len(errors) == 1
    assert re.match(f"error: .*{message}", errors[0])
    assert sorted(tmp_path.rglob("*")) == before
