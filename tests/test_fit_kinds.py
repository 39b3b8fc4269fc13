"""Whole fits of other methods, backbones and kinds of task: each is tested and predicted with afterwards."""

import pytest

from moe_peft.cli import run
from tests.tiny_fits import assert_reproduced, lora, predicted, retest
from tests.tiny_runs import results, world  # noqa: F401  (a fixture)


def test_lora_runs_end_to_end_and_tests_to_its_own_numbers(world, tmp_path):  # noqa: F811
    folder = tmp_path / "run"
    world.fit(folder, lora(world.config()))
    run(retest(folder))
    found = results(folder / "results.json")
    assert found["method"] == "LoRA" and found["rows"]["base"]["mean"] != "n/a"
    assert_reproduced(folder)


def test_a_classifier_has_heads_of_each_tasks_size_and_no_base_row(world, tmp_path):  # noqa: F811
    folder = tmp_path / "run"
    cli = world.fit(folder, world.config(("tone", "mood", "stars"), "classifier"))
    assert cli.model.heads.outputs == [2, 3, 1]
    run(retest(folder))
    found = results(folder / "results.json")
    assert found["rows"]["base"] == "n/a"
    assert {name: task["metric"] for name, task in found["rows"]["model"]["tasks"].items()} == {
        "tone": "accuracy",
        "mood": "accuracy",
        "stars": "pearson",
    }
    assert_reproduced(folder)


def test_predict_gives_a_classifiers_scores_and_numbers(world, tmp_path):  # noqa: F811
    folder = tmp_path / "run"
    world.fit(folder, world.config(("tone", "mood", "stars"), "classifier"))
    lines = predicted(folder)
    assert {line["task_name"]: len(line["scores"]) for line in lines} == {"tone": 2, "mood": 3, "stars": 0}
    assert all(isinstance(line["predicted_value"], float) for line in lines if line["task_name"] == "stars")


@pytest.mark.parametrize("kind", ["seq2seq", "causal"])
def test_all_kinds_of_task_run_end_to_end(world, tmp_path, kind):  # noqa: F811
    folder = tmp_path / "run"
    world.fit(folder, world.config(("tone", "next", "count", "stars"), kind))
    run(retest(folder))
    found = results(folder / "results.json")
    assert (
        set(found["rows"]["model"]["tasks"])
        == set(found["rows"]["base"]["tasks"])
        == {"tone", "next", "count", "stars"}
    )
    assert_reproduced(folder)


@pytest.mark.parametrize("kind", ["seq2seq", "causal"])
def test_predict_gives_generated_text(world, tmp_path, kind):  # noqa: F811
    folder = tmp_path / "run"
    world.fit(folder, world.config(("tone", "count", "stars"), kind))
    lines = predicted(folder)
    assert len(lines) == 27
    assert all(isinstance(line["text"], str) for line in lines if line["task_name"] in ("count", "stars"))
