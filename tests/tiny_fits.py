"""Whole fits of tiny models, and the commands that test and predict with what they left."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe_peft.cli import run
from tests.tiny_runs import RECORDER, World, results


def lora(config: dict[str, Any]) -> dict[str, Any]:
    """Turns a T-REX configuration into LoRA."""
    arguments = {name: value for name, value in config["model"]["init_args"].items() if name not in ("r1", "r2")}
    config["model"] = {"class_path": "LoRA", "init_args": arguments}
    config["trainer"]["callbacks"] = [{"class_path": RECORDER}]
    return config


def retest(folder: Path) -> list[str]:
    """The command that tests a run again: its own configuration and best checkpoint."""
    return ["test", f"--config={folder}/config.yaml", f"--ckpt_path={folder}/checkpoints/best.ckpt"]


def predicted(folder: Path) -> list[dict[str, Any]]:
    """The lines that `predict` writes for a run's best checkpoint."""
    run(["predict", *retest(folder)[1:]])
    return [json.loads(line) for line in (folder / "predictions.best.jsonl").read_text().splitlines()]


def assert_reproduced(folder: Path) -> None:
    """Every number of every row's scores, and so of the table, is what the fit itself found."""
    assert results(folder / "results.test-best.json")["rows"] == results(folder / "results.json")["rows"]
    fitted = (folder / "predictions.jsonl").read_bytes()
    assert len(fitted) > 1000
    assert (folder / "predictions.test-best.jsonl").read_bytes() == fitted


def fit_of(config: Callable[[World], dict[str, Any]]) -> Any:
    """A fixture: the run folder of an uninterrupted fit, made once for a file of tests; treat as read-only."""

    @pytest.fixture(scope="module")
    def folder(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
        run_folder = tmp_path_factory.mktemp("fit") / "run"
        world.fit(run_folder, config(world))
        return run_folder

    return folder


whole = fit_of(World.config)
"""Of two epochs, with dropout."""
