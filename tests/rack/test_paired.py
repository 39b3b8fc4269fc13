"""Paired differences over rows and seeds, against what a hand would compute."""

import math
from dataclasses import replace
from statistics import mean, variance

import numpy as np
import pytest

from moe_peft.data.tasks import TaskSpec
from moe_peft.paired_metrics import paired_difference
from moe_peft.predictions import Prediction
from moe_peft.rack.paired import paired

SPECS = [
    TaskSpec("a", "classification", "accuracy", "{text}", ("no", "yes")),
    TaskSpec("b", "classification", "accuracy", "{text}", ("no", "yes")),
]


def answers(*right):
    """Predictions of two tasks, by whether each row was right."""
    return [
        Prediction(f"{task}/{at}", task, 0, None, None, (1.0, 0.0) if good else (0.0, 1.0), (), None, None)
        for task, rows in enumerate(right)
        for at, good in enumerate(rows)
    ]


def test_it_is_the_formula_by_hand():
    method = [answers([1, 1, 0, 1], [1, 0]), answers([1, 0, 0, 1], [1, 1])]
    reference = [answers([0, 1, 0, 0], [0, 0]), answers([1, 0, 1, 0], [1, 0])]
    found = paired(SPECS, list(zip(method, reference, strict=True)), "sum")
    # Rows of task a: (1, 0, 0, 1) and (0, 0, -1, 1), mean (0.5, 0, -0.5, 1); of task b: (1, 0) and (0, 1), mean 0.5.
    assert found.tasks == {"a": 0.25, "b": 0.5}
    assert found.difference == 0.375
    rows = math.sqrt(np.var([0.5, 0, -0.5, 1]) / 4 + 0.0) / 2
    seeds = [mean([0.5, 0.5]), mean([0.0, 0.5])]
    assert found.rows_stderr == pytest.approx(rows)
    assert found.seeds_stderr == pytest.approx(math.sqrt(variance(seeds) / 2))
    assert found.stderr == pytest.approx(math.hypot(rows, math.sqrt(variance(seeds) / 2)))
    assert found.seeds == 2


def test_the_order_of_rows_does_not_matter_but_their_identity_does():
    method, reference = answers([1, 1, 0], [1, 0]), answers([0, 1, 0], [0, 1])
    found = paired(SPECS, [(method, reference)], "sum")
    assert paired(SPECS, [(method, reference[::-1])], "sum") == found
    with pytest.raises(ValueError, match="different rows of task 'b'"):
        paired(SPECS, [(method, reference), (method, reference[:-1])], "sum")


@pytest.mark.parametrize("metric", ["accuracy", "matthews"])
def test_one_seed_is_the_difference_over_rows(metric):
    random = np.random.default_rng(0)
    specs = [TaskSpec("a", "classification", metric, "{text}", ("no", "yes"))]
    sides = []
    for _ in range(2):
        rows = answers(random.integers(0, 2, 40))
        sides.append([replace(row, label=at % 2) for at, row in enumerate(rows)])
    found = paired(specs, [tuple(sides)], "sum")
    assert (found.difference, found.stderr) == paired_difference(specs, *sides, "sum")
    assert found.seeds_stderr is None
    twice = paired(specs, [tuple(sides)] * 2, "sum")
    assert (twice.difference, twice.stderr) == pytest.approx((found.difference, found.stderr))
