"""Whole runs through the command line: what is written, what a new process reproduces, what a resumed fit continues."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, Trainer

from moe_peft.backbones import CausalLM
from moe_peft.callbacks.semantic_prior import SemanticPriorFit
from moe_peft.cli import run
from moe_peft.data.module import MultitaskDataModule
from moe_peft.methods.trex import TRex
from tests.tiny import randomise
from tests.tiny_runs import RECORDER, files, metrics, recorded, results, world  # noqa: F401  (a fixture)

ROOT = Path(__file__).parents[1]


def lora(config):
    """Turns a T-REX configuration into LoRA."""
    arguments = {name: value for name, value in config["model"]["init_args"].items() if name not in ("r1", "r2")}
    config["model"] = {"class_path": "LoRA", "init_args": arguments}
    config["trainer"]["callbacks"] = [{"class_path": RECORDER}]
    return config


def recorder(config):
    """The arguments of a configuration's Recorder."""
    return config["trainer"]["callbacks"][-1].setdefault("init_args", {})


def test_arguments(folder):
    """`test` on a run's own configuration and best checkpoint."""
    return ["test", f"--config={folder}/config.yaml", f"--ckpt_path={folder}/checkpoints/best.ckpt"]


test_arguments.__test__ = False
NEW_FILES = {"results.test-best.json", "results.test-best.md", "predictions.test-best.jsonl"}


def predicted(folder):
    """The lines that `predict` writes for a run's best checkpoint."""
    run(["predict", *test_arguments(folder)[1:]])
    return [json.loads(line) for line in (folder / "predictions.best.jsonl").read_text().splitlines()]


def assert_reproduced(folder):
    """Every number of every row's scores, and so of the table, is what the fit itself found."""
    assert results(folder / "results.test-best.json")["rows"] == results(folder / "results.json")["rows"]
    fitted = (folder / "predictions.jsonl").read_bytes()
    assert len(fitted) > 1000
    assert (folder / "predictions.test-best.jsonl").read_bytes() == fitted


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):  # noqa: F811
    """The run folder of an uninterrupted fit of two epochs, with dropout; treat as read-only."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    world.fit(folder)
    return folder


@pytest.fixture
def copy(whole, tmp_path):
    """A copy of that run, to run further commands in."""
    shutil.copytree(whole, tmp_path / "run")
    for name in ("config.yaml",):
        file = tmp_path / "run" / name
        file.write_text(file.read_text().replace(str(whole), str(tmp_path / "run")))
    return tmp_path / "run"


# ---- what a fit writes ----------------------------------------------------------------------------------------------


def test_a_fit_fills_its_run_folder(whole):
    names = {name for name in files(whole) if not name.startswith("tensorboard/")}
    assert names == {
        "config.yaml",
        "metrics.csv",
        "checkpoints/best.ckpt",
        "checkpoints/last.ckpt",
        "results.json",
        "results.md",
        "predictions.jsonl",
        "routing/prior_clusters.csv",
        "rows.jsonl",
    }
    assert any(name.startswith("tensorboard/events") for name in files(whole))


def test_results_have_the_rows_base_majority_and_model(whole):
    found = results(whole / "results.json")
    assert found["method"] == "TRex" and found["seed"] == 3 and found["wall_seconds"] > 0
    assert list(found["rows"]) == ["base", "majority", "model"]
    for row in found["rows"].values():
        assert set(row["tasks"]) == {"tone", "next"}
        assert row["mean"] == pytest.approx(sum(task["value"] for task in row["tasks"].values()) / 2)
    assert found["rows"]["majority"]["tasks"]["next"]["value"] == 1.0  # the toy's label is always 0


def test_every_step_is_in_the_metrics_once(whole):
    assert [step for step, _ in metrics(whole, "train/loss")] == list(range(12))
    assert len(metrics(whole, "val/mean")) == 2


@pytest.mark.parametrize("name", ["best", "last"])
def test_a_checkpoint_holds_adapters_only(whole, name):
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
    subprocess.run([sys.executable, "-m", "moe_peft", *test_arguments(copy)], check=True, env=environment, cwd=copy)
    assert_reproduced(copy)
    after = files(copy)
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) == NEW_FILES


def test_test_writes_beside_the_fits_results_and_touches_nothing(copy):
    before = files(copy)
    run(test_arguments(copy))
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
        run(["predict", *test_arguments(copy)[1:], f"--predictions.path={copy}/mine.jsonl"])
    assert "exists; name another file" in capsys.readouterr().err
    assert (copy / "mine.jsonl").read_text() == "precious"


def test_validate_gives_the_value_that_chose_the_checkpoint(copy):
    cli = run(["validate", *test_arguments(copy)[1:]])
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


def test_the_second_epoch_draws_another_order(whole):
    rows = [line["rows"] for line in recorded(whole)]
    first, second = sum(rows[:6], []), sum(rows[6:], [])
    assert sorted(first) == sorted(second) and len(set(first)) == 48
    assert first != second


# ---- going on -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "stop, saved", [(8, 6), (5, 4), (10, 8)], ids=["after an epoch", "in the first epoch", "in the second epoch"]
)
def test_a_killed_fit_goes_on_as_if_nothing_had_happened(world, whole, tmp_path, stop, saved):  # noqa: F811
    folder, config = tmp_path / "run", world.config()
    recorder(config)["stop_at"] = stop
    often = [] if saved == 6 else ["--checkpoint.every_n_train_steps=4"]
    with pytest.raises(RuntimeError, match="killed"):
        world.fit(folder, config, *often)
    world.fit(folder, world.config(), "--ckpt_path=last", *often)
    lines = recorded(folder)
    assert len(lines) == stop + 12 - saved
    assert lines[:stop] == recorded(whole)[:stop]
    assert lines[stop:] == recorded(whole)[saved:]
    assert metrics(folder, "train/loss") == metrics(whole, "train/loss")
    assert metrics(folder, "val/mean") == metrics(whole, "val/mean")
    assert results(folder / "results.json")["rows"] == results(whole / "results.json")["rows"]


@pytest.mark.parametrize("method", [lora, lambda config: config], ids=["LoRA", "T-REX"])
def test_a_finished_fit_goes_on_with_more_epochs(world, tmp_path, method):  # noqa: F811
    def config(epochs):
        made = method(world.config())
        made["trainer"]["max_epochs"] = epochs
        made["model"]["init_args"]["scheduler"] = {
            "class_path": "moe_peft.optim.WarmupDecay",
            "init_args": {"warmup": 2.0, "decay": "constant"},
        }
        return made

    world.fit(tmp_path / "long", config(2))
    world.fit(tmp_path / "run", config(1))
    world.fit(tmp_path / "run", config(2), "--ckpt_path=last")
    assert recorded(tmp_path / "run") == recorded(tmp_path / "long")
    for name in ("train/loss", "val/mean"):
        assert metrics(tmp_path / "run", name) == metrics(tmp_path / "long", name)
    assert results(tmp_path / "run" / "results.json")["rows"] == results(tmp_path / "long" / "results.json")["rows"]


def test_a_longer_fit_has_the_longer_schedules_rate_from_its_first_step(world, tmp_path):  # noqa: F811
    def config(epochs):
        made = world.config()
        made["trainer"]["max_epochs"] = epochs
        made["trainer"]["callbacks"].append({"class_path": "lightning.pytorch.callbacks.LearningRateMonitor"})
        return made

    world.fit(tmp_path / "long", config(2))
    world.fit(tmp_path / "run", config(1))
    world.fit(tmp_path / "run", config(2), "--ckpt_path=last")
    name = "lr-AdamW/adapters"
    assert metrics(tmp_path / "run", name)[6:] == metrics(tmp_path / "long", name)[6:]


def test_the_last_checkpoint_is_that_of_the_last_step(world, tmp_path):  # noqa: F811
    world.fit(tmp_path / "run", None, "--trainer.max_steps=5", "--checkpoint.every_n_train_steps=2")
    assert torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)["global_step"] == 5


def test_saving_often_does_not_keep_validations_from_saving(world, whole, tmp_path):  # noqa: F811
    world.fit(tmp_path / "run", None, "--checkpoint.every_n_train_steps=3")
    best, there = (
        torch.load(folder / "checkpoints/best.ckpt", weights_only=True) for folder in (tmp_path / "run", whole)
    )
    assert best["global_step"] == there["global_step"]


# ---- other backbones and kinds --------------------------------------------------------------------------------------


def test_lora_runs_end_to_end_and_tests_to_its_own_numbers(world, tmp_path):  # noqa: F811
    folder = tmp_path / "run"
    world.fit(folder, lora(world.config()))
    run(test_arguments(folder))
    found = results(folder / "results.json")
    assert found["method"] == "LoRA" and found["rows"]["base"]["mean"] != "n/a"
    assert_reproduced(folder)


def test_a_classifier_has_heads_of_each_tasks_size_and_no_base_row(world, tmp_path):  # noqa: F811
    folder = tmp_path / "run"
    cli = world.fit(folder, world.config(("tone", "mood", "stars"), "classifier"))
    assert cli.model.heads.outputs == [2, 3, 1]
    run(test_arguments(folder))
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
    run(test_arguments(folder))
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


# ---- accumulation ---------------------------------------------------------------------------------------------------


class Gradients(Callback):
    """Makes every adapter tensor alive before the first step and keeps the gradients of that step."""

    def __init__(self, spoil=None):
        self.found, self.spoil, self.sizes = {}, spoil, []

    def on_train_start(self, trainer, pl_module):
        randomise(pl_module, scale=0.1)  # larger ones amplify rounding

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.sizes.append(len(batch["row_id"]))
        if self.spoil is not None:
            self.spoil(batch)

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.found = {name: p.grad.clone() for name, p in pl_module.named_parameters() if p.requires_grad}


def gradients(world, root, accumulation, loss_mean, spoil=None):  # noqa: F811
    """The gradient of one step of 16 rows, whose answers have 2 to 13 tokens with the end token."""
    backbone = CausalLM(str(world.backbones["causal"]), dtype="float32")
    data = MultitaskDataModule(
        [str(world.tasks["count"]), str(world.tasks["tone"])], backbone, batch_size=16, max_length=48
    )
    torch.manual_seed(0)
    module = TRex(backbone=backbone, tasks=data.specs, r1=2, r2=3, loss_mean=loss_mean)
    capture = Gradients(spoil)
    trainer = Trainer(
        accelerator="cpu",
        max_steps=1,
        accumulate_grad_batches=accumulation,
        callbacks=[SemanticPriorFit(n_init=1), capture],
        default_root_dir=str(root),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        use_distributed_sampler=False,
    )
    trainer.fit(module, datamodule=data)
    assert capture.sizes == [16 // accumulation] * accumulation
    answers = {len(row.answer) - 1 for row in data.rows("train")}
    assert {1, 12} <= answers
    return capture.found


def difference(one, other):
    """The largest difference between two gradients."""
    assert one.keys() == other.keys()
    assert max(float(gradient.abs().max()) for gradient in one.values()) > 0.1
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.mark.parametrize("loss_mean", ["row", "token"])
def test_accumulation_does_not_change_the_gradient(world, tmp_path, loss_mean):  # noqa: F811
    whole, halves, quarters = (gradients(world, tmp_path, steps, loss_mean) for steps in (1, 2, 4))
    assert all(gradient.abs().max() > 0 for gradient in whole.values())
    assert difference(whole, halves) < 1e-6
    assert difference(whole, quarters) < 1e-6


def test_a_mean_per_micro_batch_would_change_the_gradient(world, tmp_path):  # noqa: F811
    def spoil(batch):
        batch["tokens_share"] = float((batch["labels"] != -100).sum())

    right, wrong = (gradients(world, tmp_path, 4, "token", how) for how in (None, spoil))
    assert difference(right, wrong) > 1e-2
