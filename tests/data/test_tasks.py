import json
from dataclasses import asdict

import pytest

from moe_peft.data.rows import check_rows
from moe_peft.data.tasks import TaskSpec, template_fields
from tests.data.toys import class_rows

SPEC = TaskSpec("toy", "classification", "accuracy", "{text} :", ("negative", "positive"))
CHOICE = TaskSpec("quiz", "multiple_choice", "accuracy", "{text}")


def broken(**changes):
    rows = class_rows(3)
    rows[1] |= changes
    return rows


@pytest.mark.parametrize(
    ("rows", "telling"),
    [
        (broken(label=2), ["'toy'", "'1'", "label 2", "0..1"]),
        (broken(label=-1), ["label -1"]),
        (broken(label=True), ["label True"]),
        (broken(text="  \n"), ["'toy'", "'1'", "empty"]),
        (broken(choices=["positive", "positive"]), ["equal", "'positive'"]),
        (broken(choices=["positive", "negative"]), ["differ"]),
        (broken(target="positive", label=0), ["target 'positive'", "'negative'"]),
        (broken(id="0"), ["'0'", "twice"]),
        ([], ["no rows"]),
    ],
)
def test_bad_row_is_a_one_line_error_that_names_it(rows, telling):
    with pytest.raises(ValueError) as error:
        check_rows(SPEC, rows, "train")
    assert all(part in str(error.value) for part in telling)
    assert "\n" not in str(error.value)


def test_good_rows_pass():
    check_rows(SPEC, class_rows(3), "train")


def test_template_with_a_missing_column_names_the_column():
    spec = TaskSpec("toy", "classification", "accuracy", "{text} {topic}", SPEC.choices)
    with pytest.raises(ValueError, match="column 'topic', which the row lacks"):
        check_rows(spec, class_rows(2), "test")


def test_equal_options_of_a_multiple_choice_row_are_refused_up_to_blanks():
    row = {"id": "7", "text": "q", "choices": ["sea", " sea", "sky"], "label": 2}
    with pytest.raises(ValueError, match="'quiz'.*'7'.*equal.*'sea'.*equal_options: drop"):
        check_rows(CHOICE, [row], "train")


@pytest.mark.parametrize("value", [None, "3", float("nan"), True])
def test_regression_needs_a_finite_number(value):
    with pytest.raises(ValueError, match="finite"):
        check_rows(
            TaskSpec("sts", "regression", "pearson", "{text}"), [{"id": "1", "text": "a", "value": value}], "train"
        )


def test_generation_needs_a_target():
    with pytest.raises(ValueError, match="target ' ' is empty"):
        check_rows(
            TaskSpec("g", "generation", "exact_match", "{text}"), [{"id": "1", "text": "a", "target": " "}], "train"
        )


@pytest.mark.parametrize("metric", ["rouge", "accuracy/pearson", "F1"])
def test_metric_that_does_not_fit_is_refused(metric):
    with pytest.raises(ValueError, match="metric"):
        TaskSpec("toy", "classification", metric, "{text}", SPEC.choices)


def test_first_of_two_metrics_is_primary():
    assert TaskSpec("toy", "classification", "f1/accuracy", "{text}", SPEC.choices).primary_metric == "f1"


def test_two_equal_labels_of_a_task_are_refused():
    with pytest.raises(ValueError, match="'toy'.*equal.*'yes'"):
        TaskSpec("toy", "classification", "accuracy", "{text}", ("yes", "yes"))


@pytest.mark.parametrize("spec", [SPEC, CHOICE], ids=lambda spec: spec.name)
def test_a_specification_comes_back_from_plain_types(spec):
    assert TaskSpec.from_saved(json.loads(json.dumps(asdict(spec)))) == spec


@pytest.mark.parametrize("template", ["{text", "{}", "{text.upper}"])
def test_malformed_template_is_refused(template):
    with pytest.raises(ValueError, match="template"):
        template_fields(template)


def test_braces_in_a_template_can_be_literal():
    assert template_fields("{{json}} {text} {keyword}") == ["text", "keyword"]


@pytest.mark.parametrize("field", ["target", "label", "value"])
def test_a_template_must_not_give_the_answer_away(field):
    spec = TaskSpec("toy", "classification", "accuracy", f"{{text}} {{{field}}} :", SPEC.choices)
    rows = [row | {"target": "positive" if row["label"] else "negative", "value": 1.0} for row in class_rows(2)]
    with pytest.raises(ValueError, match=f"gives the answer away by {{{field}}}") as error:
        check_rows(spec, rows, "train")
    assert "\n" not in str(error.value)
