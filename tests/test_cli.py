"""The command line: quick answers and merged configurations."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

import moe_peft
from moe_peft.cli import run
from tests.tiny_runs import config, files, world  # noqa: F401  (fixtures)

ROOT = Path(__file__).parents[1]


def command(*arguments, path=ROOT):
    """Runs `python -m moe_peft` in a process of its own."""
    environment = os.environ | {"PYTHONPATH": str(path), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "moe_peft", *arguments], capture_output=True, text=True, env=environment, cwd=ROOT
    )


def merged(capsys, *arguments):
    """The configuration that `fit` would run with."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        run(["fit", *arguments, "--print_config"])
    assert caught.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)


# ---- quick answers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("argument, answer", [("--version", moe_peft.__version__), ("--help", "usage: python -m")])
def test_quick_questions_are_answered_in_half_a_second(argument, answer):
    times = []
    for _ in range(3):
        start = time.perf_counter()
        done = command(argument)
        times.append(time.perf_counter() - start)
        assert done.returncode == 0 and answer in done.stdout
    assert min(times) < 0.5


@pytest.mark.slow
def test_a_distribution_of_the_same_import_name_is_named(tmp_path):
    folder = tmp_path / "moe_peft-9.9.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: moe-peft\nVersion: 9.9\n")
    done = command("fit", "--print_config", path=f"{ROOT}{os.pathsep}{tmp_path}")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: the distribution moe-peft 9.9 is installed")
    assert "pip uninstall moe-peft" in done.stderr and done.stderr.count("\n") == 1


# ---- configurations -------------------------------------------------------------------------------------------------


def test_the_printed_configuration_is_its_own_fixed_point(config, tmp_path, capsys):  # noqa: F811
    printed = merged(capsys, f"--config={config}")
    again = tmp_path / "again.yaml"
    again.write_text(yaml.safe_dump(printed))
    assert merged(capsys, f"--config={again}") == printed
    assert printed["model"]["init_args"]["r2"] == 3 and printed["model"]["init_args"]["gate_slope"] == 100.0


def test_later_files_overlay_earlier_ones(world, config, tmp_path, capsys):  # noqa: F811
    later = world.write(tmp_path / "later.yaml", {"model": {"init_args": {"r1": 5}}, "trainer": {"max_epochs": 7}})
    printed = merged(capsys, f"--config={config}", f"--config={later}")
    assert printed["model"]["init_args"]["r1"] == 5 and printed["model"]["init_args"]["r2"] == 3
    assert printed["trainer"]["max_epochs"] == 7 and printed["trainer"]["accelerator"] == "cpu"


def test_arguments_overlay_files(config, capsys):  # noqa: F811
    printed = merged(capsys, f"--config={config}", "--model.r1", "3", "--data.batch_size=4", "--model.lr.gates=1e-3")
    assert printed["model"]["init_args"]["r1"] == 3
    assert printed["data"]["init_args"]["batch_size"] == 4
    assert printed["model"]["init_args"]["lr"]["init_args"]["gates"] == 1e-3


def test_classes_are_known_by_their_bare_names(config, capsys):  # noqa: F811
    sampling = '{"class_path": "EqualRows"}'
    printed = merged(capsys, f"--config={config}", f"--data.sampling={sampling}", "--model.embedder=TfIdf")
    assert printed["model"]["class_path"] == "moe_peft.methods.trex.TRex"
    assert printed["model"]["init_args"]["backbone"]["class_path"] == "moe_peft.backbones.CausalLM"
    assert printed["model"]["init_args"]["embedder"]["class_path"].endswith(".TfIdf")
    assert printed["data"]["class_path"] == "moe_peft.data.module.MultitaskDataModule"
    assert printed["data"]["init_args"]["sampling"]["class_path"] == "moe_peft.data.sampling.EqualRows"
    assert printed["trainer"]["callbacks"][0]["class_path"] == "moe_peft.callbacks.semantic_prior.SemanticPriorFit"


def test_a_runs_configuration_does_not_name_its_loggers_folder(world, tmp_path):  # noqa: F811
    world.fit(tmp_path / "run", None, "--trainer.max_epochs=1", "--trainer.limit_train_batches=1")
    before = files(tmp_path / "run")
    again = ["fit", f"--config={tmp_path}/run/config.yaml", f"--trainer.default_root_dir={tmp_path}/other"]
    run(again)
    assert files(tmp_path / "run") == before
    assert (tmp_path / "other" / "metrics.csv").is_file()
