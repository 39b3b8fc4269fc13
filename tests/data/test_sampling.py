from collections import Counter

import numpy as np
import pytest

from moe_peft.data.planning import Sampling
from moe_peft.data.sampling import (
    EqualRows,
    ExponentialShare,
    FixedWeights,
    Proportional,
    RoundRobin,
    Temperature,
    Uniform,
)

NAMES, SIZES = ["a", "b", "c"], [50, 30, 7]
TASK_OF = np.repeat([0, 1, 2], SIZES)


def plan(rule, batch_size=12, steps=None, seed=0, epoch=0, names=NAMES, sizes=SIZES):
    return rule.plan(names, sizes, batch_size, steps, seed=seed, epoch=epoch)


def shares(rule, sizes=SIZES):
    return rule.weights(NAMES[: len(sizes)], np.array(sizes))


ALL = [
    Proportional(),
    Proportional(batches="single_task"),
    Proportional(replacement=True),
    Temperature(3.0),
    ExponentialShare(batches="single_task"),
    Uniform(),
    RoundRobin(),
    RoundRobin(batches="single_task"),
    FixedWeights({"a": 1, "b": 0, "c": 2.5}),
    EqualRows(),
    EqualRows(replacement=True),
]


@pytest.mark.parametrize("rule", ALL, ids=lambda rule: f"{type(rule).__name__}-{rule.batches}-{rule.replacement}")
class TestEveryRule:
    def test_is_a_function_of_seed_and_epoch(self, rule):
        assert (plan(rule) == plan(rule)).all()
        assert not np.array_equal(plan(rule), plan(rule, epoch=1))
        assert not np.array_equal(plan(rule), plan(rule, seed=1))

    def test_does_not_touch_the_global_random_state(self, rule):
        np.random.seed(0)
        before = np.random.get_state()[1].copy()
        plan(rule)
        assert (np.random.get_state()[1] == before).all()

    def test_gives_rows_that_exist_in_the_asked_shape(self, rule):
        rows = plan(rule, steps=9)
        assert rows.shape == (9, 12)
        assert rows.min() >= 0 and rows.max() < sum(SIZES)

    def test_single_task_batches_hold_one_task(self, rule):
        tasks = [len(set(TASK_OF[batch])) for batch in plan(rule, steps=20)]
        assert max(tasks) == 1 if rule.batches == "single_task" else max(tasks) > 1

    def test_uses_up_a_task_before_a_row_comes_again(self, rule):
        counts = Counter(plan(rule, steps=30).ravel().tolist())
        for task in range(3):
            own = [counts[row] for row in np.flatnonzero(TASK_OF == task)]
            assert max(own) - min(own) <= 1 or rule.replacement


def test_proportional_epoch_is_every_row_once_and_the_last_batch_filled_up():
    rows = plan(Proportional())
    assert rows.shape == (8, 12)  # 87 rows
    counts = Counter(rows.ravel().tolist())
    assert len(counts) == 87 and sorted(counts.values()) == [1] * 78 + [2] * 9
    assert len(set(rows.ravel()[:87].tolist())) == 87


def test_proportional_epoch_of_single_task_batches_is_every_row_at_least_once():
    rows = plan(Proportional(batches="single_task"))
    assert len(rows) == 5 + 3 + 1
    assert set(rows.ravel().tolist()) == set(range(87))


def test_replacement_repeats_rows_early():
    assert len(set(plan(Proportional(replacement=True)).ravel().tolist())) < 87


def test_epoch_by_the_data_has_enough_steps_for_all_rows():
    assert len(plan(Uniform())) == 8


def test_every_epoch_draws_its_tasks_anew():
    assert not np.array_equal(*(TASK_OF[plan(Uniform(), epoch=epoch)] for epoch in (0, 1)))


def test_every_epoch_permutes_a_tasks_rows_anew():
    first, second = (plan(Proportional(), epoch=epoch, names=["a"], sizes=[50]) for epoch in (0, 1))
    assert not np.array_equal(first, second)


def test_proportional_shares():
    assert np.allclose(shares(Proportional()), np.array(SIZES) / 87)


def test_temperature_one_is_proportional_and_large_is_uniform():
    assert np.allclose(shares(Temperature(1.0)), shares(Proportional()))
    assert np.allclose(shares(Temperature(1e9)), 1 / 3)
    assert np.allclose(shares(Temperature(2.0), [4, 1]), [2 / 3, 1 / 3])


def test_exponential_share_is_mores_table():
    # MoRE on GLUE: sizes and sampling probabilities of its released code
    sizes = np.array([8551, 392702, 3668, 104743, 363846, 2490, 67349, 5749])
    expected = [0.1098, 0.1646, 0.1092, 0.1215, 0.1596, 0.1091, 0.1168, 0.1095]
    found = ExponentialShare().weights([str(i) for i in range(8)], sizes)
    assert np.allclose(found, expected, atol=5e-5)


@pytest.mark.parametrize("sizes", [[1_000_000, 1, 1], [10**9, 1], [1, 1, 1], [7], SIZES])
def test_exponential_share_is_nearly_uniform_whatever_the_sizes(sizes):
    found = shares(ExponentialShare(), sizes)
    assert np.isclose(found.sum(), 1)
    assert found.max() / found.min() < np.e


def test_draws_follow_the_weights():
    rule = FixedWeights({"a": 1, "b": 0, "c": 3})
    tasks = TASK_OF[plan(rule, steps=400)]
    assert abs((tasks == 2).mean() - 0.75) < 0.02 and (tasks == 1).sum() == 0


def test_round_robin_takes_the_tasks_in_turn():
    tasks = TASK_OF[plan(RoundRobin(), steps=6)].ravel()
    assert ((tasks[1:] - tasks[:-1]) % 3 == 1).all()
    batches = TASK_OF[plan(RoundRobin(batches="single_task"), steps=6)][:, 0]
    assert ((batches[1:] - batches[:-1]) % 3 == 1).all()


def test_equal_rows_in_every_batch():
    for batch in plan(EqualRows(), steps=20):
        assert Counter(TASK_OF[batch].tolist()) == {0: 4, 1: 4, 2: 4}


def test_equal_rows_names_the_sizes_that_work():
    with pytest.raises(ValueError, match="batch_size=16.*3 tasks; use 15 or 18"):
        plan(EqualRows(), batch_size=16)


def test_rules_keep_their_class_paths():
    """Configurations name them."""
    for rule in (*ALL, Sampling()):
        path = "moe_peft.data.planning" if type(rule) is Sampling else "moe_peft.data.sampling"
        assert type(rule).__module__ == path


@pytest.mark.parametrize("weights", [{"a": 1, "b": 1}, {"a": 1, "b": 1, "d": 1}])
def test_fixed_weights_must_name_exactly_the_tasks(weights):
    with pytest.raises(ValueError, match="one weight for each task: a, b, c"):
        shares(FixedWeights(weights))


@pytest.mark.parametrize("weights", [{"a": -1, "b": 2}, {"a": 0}, {}])
def test_fixed_weights_must_be_weights(weights):
    with pytest.raises(ValueError, match="task_weights"):
        FixedWeights(weights)


def test_temperature_must_be_positive():
    with pytest.raises(ValueError, match="temperature=0"):
        Temperature(0)
