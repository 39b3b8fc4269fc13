"""Metrics against scikit-learn, scipy and hand-computed values."""

import json
import math

import numpy as np
import pytest
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from moe_peft.data.tasks import TaskSpec
from moe_peft.metrics import normalise_answer, score_row, score_task
from moe_peft.paired_metrics import paired_difference
from moe_peft.predictions import Prediction, majority_predictions
from moe_peft.statistics import bootstrap, confusion_statistic, correlation_statistic

LABELS = ("a", "b", "c", "d")


def task(metric, kind="classification", classes=2, name="t"):
    return TaskSpec(name, kind, metric, "{text}", LABELS[:classes] if kind == "classification" else ())


def row(index, task_id=0, **answer):
    fields = {"label": None, "target": None, "value": None, "scores": (), "chars": (), "text": None}
    return Prediction(**{"row_id": f"t{task_id}/{index}", "task": task_id, "predicted_value": None, **fields, **answer})


def classified(gold, guess, classes=2, task_id=0):
    one_hot = np.eye(classes)
    return [
        row(i, task_id, label=int(y), scores=tuple(one_hot[p]))
        for i, (y, p) in enumerate(zip(gold, guess, strict=True))
    ]


def numbers(gold, guess):
    pairs = zip(gold, guess, strict=True)
    return [row(i, value=y, predicted_value=p) for i, (y, p) in enumerate(pairs)]


def sample(n, classes, seed=0):
    generator = np.random.default_rng(seed)
    gold = generator.integers(0, classes, n)
    return gold, np.where(generator.random(n) < 0.6, gold, generator.integers(0, classes, n))


@pytest.mark.parametrize(
    "metric, classes, oracle",
    [
        ("accuracy", 4, accuracy_score),
        ("matthews", 2, matthews_corrcoef),
        ("matthews", 4, matthews_corrcoef),
        ("f1", 2, f1_score),
        ("f1", 3, lambda gold, guess: f1_score(gold, guess, average="macro")),
        ("macro_f1", 2, lambda gold, guess: f1_score(gold, guess, average="macro")),
        ("f1/accuracy", 2, f1_score),
    ],
)
def test_class_metrics_equal_sklearn(metric, classes, oracle):
    gold, guess = sample(173, classes)
    score = score_task(task(metric, classes=classes), classified(gold, guess, classes), "sum")
    assert score.value == pytest.approx(oracle(gold, guess), abs=1e-6)
    assert (score.n, score.metric) == (173, metric.split("/")[0])


@pytest.mark.parametrize("metric, oracle", [("pearson", pearsonr), ("spearman", spearmanr)])
def test_correlations_equal_scipy_with_ties(metric, oracle):
    gold, guess = (values.astype(float) for values in sample(90, 6))
    score = score_task(task(metric, "regression"), numbers(gold, guess), "sum")
    assert score.value == pytest.approx(oracle(gold, guess)[0], abs=1e-6)


@pytest.mark.parametrize("metric, classes", [("matthews", 2), ("matthews", 4), ("f1", 2), ("macro_f1", 4)])
def test_bootstrapped_statistic_equals_sklearn_on_every_resample(metric, classes):
    gold, guess = sample(40, classes)
    index = np.random.default_rng(1).integers(0, 40, (20, 40))
    oracles = {
        "matthews": matthews_corrcoef,
        "f1": f1_score,
        "macro_f1": lambda gold, guess: f1_score(gold, guess, average="macro"),
    }
    expected = [oracles[metric](gold[i], guess[i]) for i in index]
    assert confusion_statistic(guess, gold, classes, metric)(index) == pytest.approx(expected, abs=1e-12)


def test_macro_f1_leaves_out_classes_that_do_not_occur():
    gold, guess, index = np.array([0, 1, 2]), np.array([0, 2, 2]), np.array([[0, 0, 1], [0, 1, 2]])
    # classes 0 and {1, 2}: F1 (1, 0, 0) over the three that occur; (1, 0, 2/3); class 3 never occurs
    assert confusion_statistic(guess, gold, 4, "macro_f1")(index) == pytest.approx([1 / 3, 5 / 9])
    score = score_task(task("macro_f1", classes=4), classified(gold, guess, 4), "sum")
    assert score.value == pytest.approx(5 / 9)


@pytest.mark.parametrize("by_rank, oracle", [(False, pearsonr), (True, spearmanr)])
def test_bootstrapped_correlation_equals_scipy_on_every_resample(by_rank, oracle):
    gold, guess = (values.astype(float) for values in sample(30, 5))
    index = np.random.default_rng(1).integers(0, 30, (20, 30))
    expected = [oracle(gold[i], guess[i])[0] for i in index]
    assert correlation_statistic(guess, gold, by_rank)(index) == pytest.approx(expected, abs=1e-12)


def test_bootstrap_does_not_depend_on_the_chunks():
    values = np.random.default_rng(2).random(50)
    whole, chunked = (bootstrap(lambda index: values[index].mean(1), 50, cells) for cells in (1, 30_000))
    assert np.array_equal(whole, chunked) and len(whole) == 1000


def test_bootstrap_of_a_mean_is_its_standard_error():
    values = np.random.default_rng(2).random(400)
    error = bootstrap(lambda index: values[index].mean(1), 400).std(ddof=1)
    assert error == pytest.approx(values.std() / 20, rel=0.08)


def test_pearson_stderr_is_near_fishers():
    generator = np.random.default_rng(3)
    gold = generator.normal(size=500)
    guess = 0.6 * gold + 0.8 * generator.normal(size=500)
    score = score_task(task("pearson", "regression"), numbers(gold.tolist(), guess.tolist()), "sum")
    assert score.stderr == pytest.approx((1 - score.value**2) / math.sqrt(500), rel=0.12)


def test_accuracy_stderr_is_binomial():
    score = score_task(task("accuracy"), classified([0, 0, 1, 1], [0, 0, 1, 0]), "sum")
    assert (score.value, score.stderr) == (0.75, math.sqrt(0.75 * 0.25 / 4))


@pytest.mark.parametrize("metric", ["matthews", "f1", "macro_f1", "accuracy"])
@pytest.mark.parametrize("gold, guess", [([0, 1, 0], [0, 0, 0]), ([0, 0, 0], [0, 0, 0]), ([1, 1, 1], [1, 0, 1])])
def test_constant_answers_are_never_nan(metric, gold, guess):
    score = score_task(task(metric), classified(gold, guess), "sum")
    assert math.isfinite(score.value) and math.isfinite(score.stderr)
    if metric == "matthews":
        assert (score.value, score.stderr) == (0, 0) or gold == [0, 1, 0]
        assert score.value == 0


@pytest.mark.parametrize("metric", ["pearson", "spearman"])
def test_constant_regression_scores_zero(metric):
    score = score_task(task(metric, "regression"), numbers([0.1, 0.7, 0.3], [0.1, 0.1, 0.1]), "sum")
    assert (score.value, score.stderr) == (0, 0)


def test_unparsed_number_counts_as_zero():
    gold = [1.0, 2.0, 3.0, 5.0]
    score = score_task(task("pearson", "regression"), numbers(gold, [1.0, None, 3.5, 4.0]), "sum")
    assert score.value == pytest.approx(pearsonr(gold, [1.0, 0.0, 3.5, 4.0])[0], abs=1e-6)


@pytest.mark.parametrize("metric, other", [("accuracy/f1", f1_score), ("f1/accuracy", accuracy_score)])
def test_a_second_metric_stands_beside_the_primary_one(metric, other):
    gold, guess = sample(90, 2)
    spec, name = task(metric), metric.split("/")[1]
    score, alone = (score_task(spec, classified(gold, guess), "sum") for spec in (spec, task(metric.split("/")[0])))
    assert score.beside == {name: pytest.approx(other(gold, guess), abs=1e-6)}
    assert (score.metric, score.value, score.stderr) == (alone.metric, alone.value, alone.stderr) and alone.beside == {}


def test_rankings_differ_by_length():
    prediction = row(0, label=1, scores=(-3.0, -4.0), chars=(2, 8))
    assert (prediction.choice("sum"), prediction.choice("per_char")) == (0, 1)


def test_heads_have_no_length_to_divide_by():
    assert row(0, scores=(0.1, 0.4, 0.2)).choice("per_char") == 1


def test_first_of_equal_options_wins():
    assert row(0, scores=(-1.0, -1.0)).choice("sum") == 0


@pytest.mark.parametrize("scores", [(), (math.nan, -1.0), (-1.0, math.nan)])
def test_choice_without_scores_names_the_row(scores):
    with pytest.raises(ValueError, match="row 't0/3': scores=.* the model diverged"):
        row(3, scores=scores).choice("sum")


def test_json_round_trip_keeps_every_field():
    prediction = row(0, label=1, target="é\u2028\n", scores=(-1.5, -0.1), chars=(2, 3), routing={"expert_0": 0.5})
    line = prediction.to_json("per_char", "sst2")
    assert "\n" not in line and Prediction.from_json(line) == prediction
    assert (json.loads(line)["choice"], json.loads(line)["task_name"]) == (1, "sst2")


@pytest.mark.parametrize("line", ["{}", "[]", "null", "{", '{"row_id": "a"}', "3"])
def test_a_damaged_line_is_a_value_error(line):
    with pytest.raises(ValueError):
        Prediction.from_json(line)


@pytest.mark.parametrize(
    "text, normal",
    [("  The Cat. ", "cat"), ("-5", "-5"), ("3.5,", "3.5"), ("(A)", "a"), ("the", "the"), ("", ""), ("a  b", "b")],
)
def test_normalised_answers(text, normal):
    assert normalise_answer(text) == normal


def test_exact_match_is_normalised():
    rows = [row(0, target="Paris", text="paris."), row(1, target="A", text="The"), row(2, target="no", text=None)]
    assert score_task(task("exact_match", "generation"), rows, "sum").value == pytest.approx(1 / 3)


def test_row_mean_and_error_over_independent_tasks():
    specs = [task("accuracy", name="x"), task("accuracy", name="y"), task("accuracy", name="empty")]
    rows = classified([0, 1], [0, 0]) + classified([0] * 4, [0, 0, 0, 1], task_id=1)
    result = score_row(specs, rows, "sum")
    assert list(result.tasks) == ["x", "y"]
    assert result.mean == (0.5 + 0.75) / 2
    assert result.stderr == pytest.approx(math.sqrt(0.25 / 2 + 0.75 * 0.25 / 4) / 2)


def test_paired_difference_by_hand_in_any_order():
    specs = [task("accuracy", name="x"), task("accuracy", name="y")]
    a = classified([0] * 4, [0, 0, 0, 1]) + classified([1, 1], [1, 1], task_id=1)
    b = classified([0] * 4, [0, 1, 1, 0]) + classified([1, 1], [0, 1], task_id=1)
    b = [b[0], b[3], b[1], b[2], *b[4:]]
    # per-row differences (0, 1, 1, -1): mean 1/4, variance 11/16; (1, 0): mean 1/2, variance 1/4
    difference, stderr = paired_difference(specs, a, b, "sum")
    assert difference == pytest.approx((1 / 4 + 1 / 2) / 2)
    assert stderr == pytest.approx(math.sqrt(11 / 16 / 4 + 1 / 4 / 2) / 2)


@pytest.mark.parametrize("metric", ["matthews", "f1"])
def test_paired_bootstrap_uses_the_same_rows_for_both(metric):
    gold, guess = sample(200, 2)
    a, spec = classified(gold, guess), [task(metric)]
    assert paired_difference(spec, a, a, "sum") == (0, 0)
    other = guess.copy()
    other[:4] = 1 - other[:4]
    _, stderr = paired_difference(spec, a, classified(gold, other), "sum")
    assert 0 < stderr < 0.5 * score_task(spec[0], a, "sum").stderr


def test_paired_difference_is_the_difference_of_the_metric():
    gold, guess = sample(100, 2)
    other = sample(100, 2, seed=5)[1]
    difference, _ = paired_difference([task("matthews")], classified(gold, guess), classified(gold, other), "sum")
    assert difference == pytest.approx(matthews_corrcoef(gold, guess) - matthews_corrcoef(gold, other), abs=1e-6)


def test_other_rows_are_refused():
    a = classified([0, 1, 1], [0, 1, 1])
    with pytest.raises(ValueError, match="different rows of task 't': 1 in one only, first 't0/2'"):
        paired_difference([task("accuracy")], a, a[:2], "sum")


@pytest.mark.parametrize(
    "rows, message",
    [
        ([], r"predictions=\[\] cannot be scored"),
        (classified([0], [0]) * 2, "row 't0/0' occurs twice"),
        ([row(0, scores=(1.0, 0.0))], "row 't0/0' has no gold answer"),
    ],
)
def test_rows_that_cannot_be_scored(rows, message):
    with pytest.raises(ValueError, match=message):
        score_row([task("accuracy")], rows, "sum")


def test_majority_answers_the_train_label_and_leaves_other_kinds_out():
    specs = [task("accuracy", classes=3, name="x"), task("pearson", "regression", name="y")]
    rows = classified([0, 2, 2], [1, 1, 1], classes=3) + [row(0, 1, value=1.0, predicted_value=1.0)]
    answers = majority_predictions(specs, rows, {"x": 2})
    assert [(p.row_id, p.scores) for p in answers] == [(f"t0/{i}", (0.0, 0.0, 1.0)) for i in range(3)]
    assert score_row(specs, answers, "per_char").mean == pytest.approx(2 / 3)
