"""Whole runs through the command line: what is written, what a new process reproduces, the same numbers again."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moe_peft.cli import run
from tests.tiny_fits import assert_reproduced, predicted, retest, whole  # noqa: F401  (a fixture)
from tests.tiny_runs import files, metrics, recorded, results, world  # noqa: F401  (a fixture)

ROOT = Path(__file__).parents[1]
NEW_FILES = {"results.test-best.json", "results.test-best.md", "predictions.test-best.jsonl"}


@pytest.fixture
def copy(whole, tmp_path):  # noqa: F811
    """A copy of that run, to run further commands in."""
    shutil.copytree(whole, tmp_path / "run")
    file = tmp_path / "run" / "config.yaml"
    file.write_text(file.read_text().replace(str(whole), str(tmp_path / "run")))
    return tmp_path / "run"


# ---- what a fit writes ----------------------------------------------------------------------------------------------


def test_a_fit_fills_its_run_folder(whole):  # noqa: F811
    names = {name for name in files(whole) if not name.startswith("tensorboard/")}
    assert names == {
        "config.yaml",
        "metrics.csv",
        "checkpoints/best.ckpt",
        "checkpoints/last.ckpt",
        "checkpoints/last.previous.ckpt",
        "results.json",
        "results.md",
        "predictions.jsonl",
        "routing/prior_clusters.csv",
        *(f"routing/{name}.csv" for name in ("clusters", "embedding", "gates", "summary", "use")),
        "routing/findings.json",
        "rows.jsonl",
    }
    assert any(name.startswith("tensorboard/events") for name in files(whole))


def test_results_have_the_rows_base_majority_and_model(whole):  # noqa: F811
    found = results(whole / "results.json")
    assert found["method"] == "TRex" and found["seed"] == 3 and found["wall_seconds"] > 0
    assert list(found["rows"]) == ["base", "majority", "model"]
    for row in found["rows"].values():
        assert set(row["tasks"]) == {"tone", "next"}
        assert row["mean"] == pytest.approx(sum(task["value"] for task in row["tasks"].values()) / 2)
    assert found["rows"]["majority"]["tasks"]["next"]["value"] == 1.0  # the toy's label is always 0


def test_every_step_is_in_the_metrics_once(whole):  # noqa: F811
    assert [step for step, _ in metrics(whole, "train/loss")] == list(range(12))
    assert len(metrics(whole, "val/mean")) == 2


@pytest.mark.parametrize("name", ["best", "last"])
def test_a_checkpoint_holds_adapters_only(whole, name):  # noqa: F811
    checkpoint = torch.load(whole / "checkpoints" / f"{name}.ckpt", weights_only=True)
    kept = checkpoint["state_dict"]
    assert len(kept) > 20
    assert all(".factors." in key or ".router." in key or key.startswith("prior.") for key in kept)
    # Nothing as large as the embedding, the smallest tensor of the base that is not a norm.
    assert max(value.numel() for value in kept.values()) < 97 * 32
    assert checkpoint["moe_peft"]["tasks"] == ["tone", "next"]
    assert checkpoint["optimizer_states"]


# ---- commands on a finished run -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_new_process_reproduces_the_fits_own_test_numbers(copy):
    before = files(copy)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-m", "moe_peft", *retest(copy)], check=True, env=environment, cwd=copy)
    assert_reproduced(copy)
    after = files(copy)
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) == NEW_FILES


def test_test_writes_beside_the_fits_results_and_touches_nothing(copy):
    before = files(copy)
    run(retest(copy))
    after = files(copy)
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) == NEW_FILES
    assert_reproduced(copy)


def test_the_words_best_and_last_name_the_run_folders_checkpoints(copy):
    run(["test", f"--config={copy}/config.yaml", "--ckpt_path=last"])
    found = results(copy / "results.test-last.json")
    assert found["checkpoint"] == str(copy / "checkpoints" / "last.ckpt")


def test_predict_writes_one_line_per_input(copy):
    before = files(copy)
    lines = predicted(copy)
    assert set(files(copy)) - set(before) == {"predictions.best.jsonl"}
    assert {line["row_id"] for line in lines} == {f"{task}/{i}" for task in ("tone", "next") for i in range(2000, 2009)}
    assert len(lines) == 18
    for line in lines:
        assert line["task_name"] == line["row_id"].split("/")[0]
        assert len(line["scores"]) == (2 if line["task_name"] == "tone" else 3)
        assert line["choice"] == max(range(len(line["scores"])), key=line["scores"].__getitem__)
        assert set(line["routing"]) == {f"expert_{i}" for i in range(6)}
    correct = [line["choice"] == line["label"] for line in lines if line["task_name"] == "tone"]
    assert sum(correct) / 9 == results(copy / "results.json")["rows"]["model"]["tasks"]["tone"]["value"]


def test_predict_refuses_an_existing_file(copy, capsys):
    (copy / "mine.jsonl").write_text("precious")
    with pytest.raises(SystemExit):
        run(["predict", *retest(copy)[1:], f"--predictions.path={copy}/mine.jsonl"])
    assert "exists; name another file" in capsys.readouterr().err
    assert (copy / "mine.jsonl").read_text() == "precious"


def test_validate_gives_the_value_that_chose_the_checkpoint(copy):
    cli = run(["validate", *retest(copy)[1:]])
    best = max(float(value) for _, value in metrics(copy, "val/mean"))
    assert float(cli.trainer.callback_metrics["val/mean"]) == pytest.approx(best, abs=1e-6)


# ---- the same numbers again -----------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_rows_and_losses_to_the_last_bit(world, whole, tmp_path):  # noqa: F811
    world.fit(tmp_path / "run")
    assert recorded(tmp_path / "run") == recorded(whole)


def test_another_seed_of_the_adapters_gives_other_losses(world, whole, tmp_path):  # noqa: F811
    world.fit(tmp_path / "run", world.config() | {"seed_everything": 4})
    assert [line["rows"] for line in recorded(tmp_path / "run")] == [line["rows"] for line in recorded(whole)]
    assert [line["loss"] for line in recorded(tmp_path / "run")] != [line["loss"] for line in recorded(whole)]


@pytest.mark.slow
def test_loader_processes_change_nothing(world, whole, tmp_path):  # noqa: F811
    world.fit(tmp_path / "run", world.config(), "--data.num_workers=2")
    assert recorded(tmp_path / "run") == recorded(whole)


def test_the_second_epoch_draws_another_order(whole):  # noqa: F811
    rows = [line["rows"] for line in recorded(whole)]
    first, second = sum(rows[:6], []), sum(rows[6:], [])
    assert sorted(first) == sorted(second) and len(set(first)) == 48
    assert first != second
