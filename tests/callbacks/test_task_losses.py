"""Learning curves by task: of all rows since the last entry, and the same after an interruption."""

from collections import Counter

import pytest

from tests.tiny_kills import adding, assert_uninterrupted, finish, start
from tests.tiny_progress import Observer, observed, task_means
from tests.tiny_runs import metrics, world  # noqa: F401  (a fixture)


def windows(config, every=4, accumulation=2):
    """A configuration of three tasks that logs every so many steps; nine steps an epoch."""
    config["trainer"] |= {"log_every_n_steps": every, "accumulate_grad_batches": accumulation}
    return config


def curves(folder, tasks=("tone", "next", "count")):
    """What was logged: {task: {step: value}}."""
    return {task: {step: float(value) for step, value in metrics(folder, f"train/{task}/loss")} for task in tasks}


def test_an_entry_is_the_mean_over_all_rows_since_the_last(world, tmp_path):  # noqa: F811
    world.fit(tmp_path / "run", observed(windows(world.config(("tone", "next", "count")))))
    found, seen = curves(tmp_path / "run"), Observer.last.seen
    assert len(seen) == 36
    for last in (3, 7, 11, 15):
        expected = task_means([one for one in seen if last - 4 < one.step <= last])
        assert {task: found[task].pop(last) for task in expected} == pytest.approx(expected, rel=1e-5)
    assert found == {"tone": {}, "next": {}, "count": {}}


def test_a_task_without_rows_has_no_entry(world, tmp_path):  # noqa: F811
    config = observed(windows(world.config(("tone", "next", "count")), every=1, accumulation=1))
    config["data"]["init_args"]["sampling"] = {"class_path": "Proportional", "init_args": {"batches": "single_task"}}
    world.fit(tmp_path / "run", config)
    expected = {task: [] for task in ("tone", "next", "count")}
    for one in Observer.last.seen:
        expected[one.tasks[0]].append(one.step)
    assert {task: list(values) for task, values in curves(tmp_path / "run").items()} == expected
    assert min(map(len, expected.values())) > 0


def test_a_stage_without_a_task_loss_has_none(world, tmp_path):  # noqa: F811
    world.fit(tmp_path / "run", world.config(method="TTLoRAMoE"))
    found = curves(tmp_path / "run", ("tone", "next"))
    assert list(found["tone"]) == list(found["next"]) == list(range(6))
    assert len(metrics(tmp_path / "run", "train/loss")) == 12


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):  # noqa: F811
    """The run folder of a fit that logs every three of its twelve steps; read-only."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    world.fit(folder, windows(world.config(), every=3))
    assert list(curves(folder, ["tone"])["tone"]) == [2, 5, 8, 11]
    return folder


@pytest.mark.parametrize("after", [8, 11], ids=["within the fifth step", "where the sixth is logged"])
def test_a_resumed_fit_logs_the_same(world, whole, tmp_path, after):  # noqa: F811
    folder, broken = tmp_path / "run", adding(windows(world.config(), every=3), "Own", after=after)
    broken["trainer"]["callbacks"][1]["init_args"] = {"stop_at": after // 2 + 1}
    with pytest.raises(RuntimeError, match="killed"):
        world.fit(folder, broken)
    world.fit(folder, windows(world.config(), every=3), f"--ckpt_path={folder}/own.ckpt")
    assert_uninterrupted(folder, whole)


@pytest.mark.slow
def test_two_ranks_count_the_rows_of_both(world, tmp_path):  # noqa: F811
    config = windows(world.config(), accumulation=1)
    config["model"]["init_args"]["dropout"] = 0.0
    config["trainer"] |= {"max_epochs": 1, "log_every_n_steps": 3}
    world.fit(tmp_path / "one", config)
    config["trainer"] |= {"devices": 2, "strategy": "ddp"}
    said = finish(start(world.write(tmp_path / "two.yaml", config), tmp_path / "two"), tmp_path / "two").splitlines()
    for words in ("step 1/6 ", "step 6/6  loss", "run  "):  # rank zero alone tells of progress
        assert sum(line.startswith(words) for line in said) == 1
    one, two = (curves(tmp_path / name, ("tone", "next")) for name in ("one", "two"))
    assert Counter(map(len, one.values())) == {2: 2}
    for task, values in one.items():
        assert two[task] == pytest.approx(values, rel=1e-4)
