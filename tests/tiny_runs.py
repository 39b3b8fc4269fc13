"""Tiny saved models, tasks and configurations for tests that run the command line as a user does."""

import csv
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Callback

from moe_peft.cli import run
from tests.data.toys import TOY_WORDS, choice_rows, class_rows, word_tokenizer, write_task
from tests.tiny import BERT, LLAMA, T5

WORDS = TOY_WORDS + " happy sad calm one two three four five six seven eight nine ten eleven twelve 0.0 0.5 1.0 1.5 2.0"
NUMBERS = "one two three four five six seven eight nine ten eleven twelve".split()
MOODS = ("happy", "sad", "calm")


def mood_rows(count: int, start: int = 0) -> list[dict[str, Any]]:
    """Rows of a task of three classes."""
    return [
        {"id": str(i), "text": f"film {i} was {MOODS[i % 3]}", "choices": list(MOODS), "label": i % 3}
        for i in range(start, start + count)
    ]


def text_rows(count: int, start: int = 0) -> list[dict[str, Any]]:
    """Rows of a generation task, with answers of 1 to 12 words."""
    return [
        {"id": str(i), "text": f"after {i} comes", "target": " ".join(NUMBERS[: i % 12 + 1])}
        for i in range(start, start + count)
    ]


def value_rows(count: int, start: int = 0) -> list[dict[str, Any]]:
    """Rows of a regression task."""
    return [{"id": str(i), "text": f"film {i} was good", "value": i % 5 / 2} for i in range(start, start + count)]


RECORDER = "tests.tiny_runs.Recorder"
ROWS = {
    "tone": (class_rows, "classification", "accuracy"),
    "next": (choice_rows, "multiple_choice", "accuracy"),
    "mood": (mood_rows, "classification", "accuracy"),
    "count": (text_rows, "generation", "exact_match"),
    "stars": (value_rows, "regression", "pearson"),
}
METHODS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "TRex": ({"r1": 2, "r2": 3}, {"class_path": "SemanticPriorFit", "init_args": {"n_init": 2}}),
    "MoRE": ({"rank": 4}, {"class_path": "TaskContrast"}),
    "TTLoRAMoE": ({"rank": 2}, {"class_path": "FreezeThenRoute", "init_args": {"experts_epochs": 1}}),
}


class World:
    """Saved tiny backbones and task folders, and the command line on them.

    Args:
        root: an empty folder.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.backbones = {
            kind: save_backbone(root / "models" / kind, kind) for kind in ("causal", "seq2seq", "classifier")
        }
        self.tasks = {name: self.task(root / "tasks" / name, name) for name in ROWS}

    @staticmethod
    def task(folder: Path, name: str, train: int = 24) -> Path:
        """Writes one of the tasks into a folder, for a test that spoils it."""
        rows, kind, metric = ROWS[name]
        splits = {"train": rows(train), "validation": rows(5, start=1000), "test": rows(9, start=2000)}
        return write_task(folder, splits, kind, metric=metric, name=name)

    def config(
        self, tasks: tuple[str, ...] | list[Path] = ("tone", "next"), kind: str = "causal", method: str = "TRex"
    ) -> dict[str, Any]:
        """A whole configuration of T-REX, or another method: two epochs on one process, no cache outside `root`."""
        own, callback = METHODS[method]
        class_path = {"causal": "CausalLM", "seq2seq": "Seq2SeqLM", "classifier": "Classifier"}[kind]
        backbone = {"class_path": class_path, "init_args": {"name": str(self.backbones[kind]), "dtype": "float32"}}
        folders = [str(self.tasks[task] if isinstance(task, str) else task) for task in tasks]
        return {
            "seed_everything": 3,
            "model": {
                "class_path": method,
                "init_args": {
                    "backbone": backbone,
                    "dropout": 0.1,
                    "max_new_tokens": 3,
                    "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
                    **own,
                },
            },
            "data": {
                "class_path": "MultitaskDataModule",
                "init_args": {"tasks": folders, "batch_size": 8, "max_length": 32, "seed": 0},
            },
            "trainer": {
                "accelerator": "cpu",
                "max_epochs": 2,
                "log_every_n_steps": 1,
                "callbacks": [dict(callback), {"class_path": RECORDER}],
            },
            "results": {"cache_dir": str(self.root / "cache"), "save_predictions": True},
        }

    @staticmethod
    def write(path: Path, config: dict[str, Any]) -> Path:
        """Writes a YAML file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(config), encoding="utf-8")
        return path

    def fit(self, folder: Path, config: dict[str, Any] | None = None, *more: str) -> Any:
        """Runs a whole fit in a run folder and returns the CLI object."""
        file = self.write(folder.with_suffix(".yaml"), config or self.config())
        return run(["fit", f"--config={file}", f"--trainer.default_root_dir={folder}", *more])


def save_backbone(folder: Path, kind: str) -> Path:
    """Saves a random model with a tokenizer of whole words that fits its vocabulary."""
    import transformers

    torch.manual_seed(0)
    tokenizer = word_tokenizer(WORDS, end=kind == "seq2seq")
    shape = {"causal": LLAMA, "seq2seq": T5, "classifier": BERT}[kind] | {"vocab_size": len(tokenizer)}
    auto = {"causal": "AutoModelForCausalLM", "seq2seq": "AutoModelForSeq2SeqLM", "classifier": "AutoModel"}[kind]
    model_type = shape.pop("model_type")
    config = transformers.AutoConfig.for_model(model_type, **shape)
    getattr(transformers, auto).from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Backbones and tasks, saved once."""
    return World(tmp_path_factory.mktemp("world"))


def results(file: Path) -> dict[str, Any]:
    """Reads a results file."""
    return json.loads(file.read_text(encoding="utf-8"))


def metrics(folder: Path, name: str) -> list[tuple[int, str]]:
    """Reads one value's history, (step, value as written), from a run's metrics.csv."""
    with (folder / "metrics.csv").open(newline="") as file:
        return [(int(row["step"]), row["value"]) for row in csv.DictReader(file) if row["name"] == name]


def files(folder: Path) -> dict[str, bytes]:
    """All files below a folder with their contents."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def one_error(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Runs a command that must fail with status 2 and exactly one line on stderr; returns that line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        run(list(arguments))
    lines = capsys.readouterr().err.strip().splitlines()
    assert caught.value.code == 2, caught.value.code
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    assert len(lines[0]) <= 700
    return lines[0]


@pytest.fixture
def config(world: World, tmp_path: Path) -> Path:
    """A configuration file that runs."""
    return world.write(tmp_path / "config.yaml", world.config())


@pytest.fixture
def refused(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a fit of a spoiled configuration and returns its one line; nothing may be left in the run folder."""

    def fit(*more: str, **sections: dict[str, Any]) -> str:
        spoiled = world.config()
        for section, arguments in sections.items():
            target = spoiled[section] if section == "trainer" else spoiled[section]["init_args"]
            target.update(arguments)
        file = world.write(tmp_path / "spoiled.yaml", spoiled)
        folder = tmp_path / "run"
        line = one_error(capsys, "fit", f"--config={file}", f"--trainer.default_root_dir={folder}", *more)
        assert not folder.exists()
        return line

    return fit


class Recorder(Callback):
    """Writes row ids and the exact loss of every micro-batch to <run>/rows.jsonl; may break off.

    Args:
        stop_at: raise before the micro-batch of this number, as a killed process would end.
        pause: wait so many seconds after every micro-batch, for a test that is to hit it.
    """

    def __init__(self, stop_at: int | None = None, pause: float = 0.0) -> None:
        self.stop_at, self.pause = stop_at, pause

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.stop_at:
            raise RuntimeError("killed")

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        place = {"rank": trainer.global_rank, "batch": trainer.fit_loop.total_batch_idx, "step": trainer.global_step}
        line = place | {"rows": batch["row_id"], "loss": float(outputs["loss"]).hex()}
        with (Path(trainer.default_root_dir) / "rows.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        time.sleep(self.pause)


def recorded(folder: Path) -> list[dict[str, Any]]:
    """Reads what a Recorder wrote."""
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
