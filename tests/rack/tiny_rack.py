"""Tiny comparisons: a base, tasks and methods as YAMLs, and fits that run in this process, or only seem to run."""

import contextlib
import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from moe_peft.cli import run
from moe_peft.rack import fits
from tests.reporting.toy_runs import ToyRun
from tests.tiny_runs import World

RATE = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}}
METHODS = {
    "lora": {"class_path": "LoRA", "init_args": {"rank": 2, "optimizer": RATE}},
    "trex": {"class_path": "TRex", "init_args": {"r1": 2, "r2": 2, "optimizer": RATE}},
    "mola": {"class_path": "MoLA", "init_args": {"experts": 2, "rank": 2, "optimizer": RATE}},
}


class Rack:
    """A comparison's files in a folder; `compare.yaml` is written anew by `write`.

    Args:
        world: of saved backbones and tasks.
        root: an empty folder.
    """

    def __init__(self, world: World, root: Path) -> None:
        self.root, self.out = root, root / "out"
        backbone = {"class_path": "CausalLM", "init_args": {"name": str(world.backbones["causal"]), "dtype": "float32"}}
        base = {"model": {"init_args": {"backbone": backbone}}}
        tasks = [str(world.tasks["tone"]), str(world.tasks["next"])]
        data = {"class_path": "MultitaskDataModule", "init_args": {"tasks": tasks, "batch_size": 8, "max_length": 32}}
        self.base, self.data = (
            world.write(root / f"{name}.yaml", content) for name, content in (("base", base), ("data", {"data": data}))
        )
        for name, model in METHODS.items():
            callbacks = {"trainer": {"callbacks": [{"class_path": "SemanticPriorFit", "init_args": {"n_init": 2}}]}}
            world.write(root / f"{name}.yaml", {"model": model, **(callbacks if name == "trex" else {})})
        self.common = {
            "trainer": {"accelerator": "cpu", "max_epochs": 2, "log_every_n_steps": 1},
            "results": {"cache_dir": str(root / "cache")},
        }

    def write(self, methods: Sequence[Any] = ("lora", "trex"), **settings: Any) -> Path:
        """Writes the comparison; methods are known by their names here."""

        def placed(method: Any) -> Any:
            known = {name: str(self.root / f"{name}.yaml") for name in METHODS}
            if isinstance(method, str):
                return known.get(method, method)
            return method | {"method": known.get(method.get("method"), method.get("method"))}

        content = {
            "base": str(self.base),
            "data": str(self.data),
            "out": str(self.out),
            "common": self.common,
            "methods": [placed(method) for method in methods],
        } | settings
        if isinstance(content.get("budget"), dict | str):
            content["budget"] = placed(content["budget"])
        file = self.root / "compare.yaml"
        file.write_text(yaml.safe_dump(content), encoding="utf-8")
        return file


@pytest.fixture
def rack(world: World, tmp_path: Path) -> Rack:
    """The files of a comparison of LoRA and T-REX."""
    return Rack(world, tmp_path)


class InProcess:
    """Stands in for a fit's process: runs the command here, and remembers it."""

    def __init__(self) -> None:
        self.commands: list[list[str]] = []

    def __call__(self, command: Sequence[str], log: Path, lock: int) -> int:
        self.commands.append(list(command))
        with log.open("a") as stream, contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
            try:
                run(list(command[3:]))
            except SystemExit as stop:
                return int(stop.code or 0)
        return 0


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> InProcess:
    """Fits run in this process."""
    own = InProcess()
    monkeypatch.setattr(fits, "supervised", own)
    return own


class Pretended:
    """Stands in for a fit's process: writes the files of a run without any training.

    Args:
        scores: of a tag, seed and learning rate the score on validation and on test data; None diverges. Before the
            checkpoint that is tested there was a better one, of a stage that has passed.
    """

    def __init__(self, scores: Callable[[str, int, float], tuple[float, float] | None]) -> None:
        self.scores, self.done = scores, []

    def __call__(self, command: Sequence[str], log: Path, lock: int) -> int:
        about = json.loads((log.parent / "rack.json").read_text())
        place = about["tag"], about["seed"], about["learning_rate"]
        self.done.append(place)
        found = self.scores(*place)
        if found is None:
            log.write_text("error: the loss is not finite at step 3: task tone; lower the learning rate\n")
            return 2
        ToyRun(log.parent, "LoRA", about["tasks"], seed=about["seed"]).write()
        content = json.loads((log.parent / "results.json").read_text())
        content["rows"]["model"]["mean"] = found[1]
        content["validation"] = {"name": "val/mean", "value": found[0]}
        (log.parent / "results.json").write_text(json.dumps(content))
        rows = [(step, 0, "val/mean", found[0] - drop) for step, drop in ((1, -0.3), (2, 0.0), (3, 0.1))]
        with (log.parent / "metrics.csv").open("w", newline="") as file:
            csv.writer(file).writerows([["step", "epoch", "name", "value"], *rows])
        return 0


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Pretended]:
    """Makes fits pretended ones, with these scores."""

    def make(scores: Callable[[str, int, float], tuple[float, float] | None]) -> Pretended:
        own = Pretended(scores)
        monkeypatch.setattr(fits, "supervised", own)
        return own

    return make
