"""Heads of different class counts, and what another task's head says of a row."""

import math

import pytest
import torch
from torch.nn.functional import cross_entropy

from moe_peft.data.tasks import TaskSpec
from moe_peft.methods.heads import TaskHeads, as_own_answer
from moe_peft.metrics import score_row
from moe_peft.predictions import Prediction

TONE = TaskSpec("tone", "classification", "accuracy", "{text}", ("bad", "good"))
TOPIC = TaskSpec("topic", "classification", "accuracy", "{text}", ("sport", "art", "law", "food"))
VALUE = TaskSpec("value", "regression", "pearson", "{text}")
OTHER = TaskSpec("other", "classification", "accuracy", "{text}", ("good", "neutral", "bad"))
TASKS = [TONE, TOPIC, VALUE, OTHER]


def heads():
    torch.manual_seed(0)
    made = TaskHeads(6, TASKS)
    return made, torch.randn(5, 6)


def by_hand(made, feature, task):
    """A task's own outputs, from its own rows of the matrix."""
    start = [0, 2, 6, 7][task]
    own = slice(start, start + [2, 4, 1, 3][task])
    return made.linear.weight[own] @ feature + made.linear.bias[own]


def test_losses_are_each_tasks_own_and_finite():
    made, features = heads()
    task_id, target = torch.tensor([0, 1, 2, 3, 1]), torch.tensor([1.0, 3.0, 0.5, 2.0, 0.0])
    found = made.losses(features, task_id, target)
    for row, task in enumerate(task_id.tolist()):
        own = by_hand(made, features[row], task)
        expected = (own[0] - target[row]) ** 2 if task == 2 else cross_entropy(own, target[row].long())
        torch.testing.assert_close(found[row], expected)
    assert torch.isfinite(found).all()
    found.sum().backward()
    assert torch.isfinite(made.linear.weight.grad).all()


def test_scores_are_each_tasks_own_and_none_of_no_task():
    made, features = heads()
    found = made.scores(features, torch.tensor([1, -1, 2, 0, 3]))
    assert found[1] == []
    for row, task in ((0, 1), (2, 2), (3, 0), (4, 3)):
        own = by_hand(made, features[row], task)
        assert found[row] == pytest.approx((own if task == 2 else own.log_softmax(0)).tolist(), abs=1e-6)


def test_a_class_of_the_same_name_counts_whatever_its_number():
    scores = [-0.1, -3.0, -4.0]  # good, neutral, bad
    assert as_own_answer(TONE, OTHER, scores, label=1) == [-4.0, -0.1]
    back = as_own_answer(OTHER, TONE, [-0.2, -2.0], label=0)
    assert back[2] == -0.2 and back[0] == -2.0 and back[1] < -1e6


def wrong(answer, label):
    return max(range(len(answer)), key=answer.__getitem__) != label


@pytest.mark.parametrize("label", [0, 1])
@pytest.mark.parametrize(
    ("other", "scores"),
    [(TOPIC, [-1.0, -2.0, -3.0, -0.5]), (OTHER, [-2.0, -0.1, -1.0]), (VALUE, [0.3]), (None, [])],
    ids=["other classes", "best class is another", "a value", "no head"],
)
def test_any_other_answer_is_an_error_and_not_infinite(other, scores, label):
    answer = as_own_answer(TONE, other, scores, label)
    assert len(answer) == 2 and all(map(math.isfinite, answer))
    assert wrong(answer, label)


def test_an_unlabelled_row_without_a_class_of_its_own_has_no_answer():
    assert as_own_answer(TONE, TOPIC, [-1.0] * 4, None) == []


def test_a_value_is_no_answer_of_another_head():
    assert as_own_answer(VALUE, TONE, [-0.1, -3.0], None) == []


def prediction(row_id, task, label, scores, value=None, predicted=None):
    return Prediction(row_id, task, label, None, value, tuple(scores), (), None, predicted)


def test_errors_reach_the_score_and_the_files_stay_json():
    """Two right rows, one of a class of the same name, three that no own class won."""
    rows = [prediction("tone/right", 0, 0, [-0.1, -2.0])]
    for at, (other, scores) in enumerate([(OTHER, [-0.1, -3.0, -4.0]), (TOPIC, [-0.1] * 4), (None, []), (VALUE, [1])]):
        rows.append(prediction(f"tone/{at}", 0, 1, as_own_answer(TONE, other, scores, 1)))
    assert score_row(TASKS, rows, "sum").tasks["tone"].value == pytest.approx(2 / 5)
    partly = prediction("other/0", 3, 0, as_own_answer(OTHER, TONE, [-0.2, -2.0], 0))
    for row in (*rows, partly):
        assert "Infinity" not in row.to_json()
