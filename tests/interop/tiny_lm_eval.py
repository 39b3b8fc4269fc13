"""Tiny trained adapters, task folders that they answer, and lm-eval's own command line on them."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'lightning-moe-peft[lm-eval]'")

from lm_eval.api.instance import Instance  # noqa: E402

from moe_peft.data.module import MultitaskDataModule  # noqa: E402
from moe_peft.interop.lm_eval import __main__ as command  # noqa: E402
from moe_peft.interop.lm_eval.model import MoePeftLM, halving  # noqa: E402, F401
from moe_peft.interop.lm_eval.requests import Request, RequestEncoder  # noqa: E402, F401
from moe_peft.interop.lm_eval.tasks import task_config, write_tasks  # noqa: E402, F401
from moe_peft.methods.evaluation import predict_rows  # noqa: E402
from moe_peft.predictions import Prediction  # noqa: E402
from tests.data.toys import choice_rows, class_rows, write_task  # noqa: E402
from tests.tiny_checkpoints import backbones, save, trained  # noqa: E402, F401  (backbones: a fixture)
from tests.tiny_runs import mood_rows  # noqa: E402

PROMPTS = ["film was good :", "after 4 comes", "film was bad film was bad film was sad :", "happy", "one two three"]
METHODS: dict[str, dict[str, Any]] = {
    "LoRA": {"rank": 2},
    "TRex": {"r1": 2, "r2": 3},
    "MoRE": {"rank": 5, "experts": 3},
    "TTLoRA": {"rank": 2},
    "TTLoRAMoE": {"rank": 2},
}
CASES = [*((method, "causal") for method in METHODS), ("TRex", "seq2seq"), ("MoRE", "seq2seq")]
NAMES = ["tone", "topic", "mood"]
"""Folders, in the order of the adapters' tasks; the second task is called sci/topic there."""
SERVED = "topic:sci/topic"


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Task folders by name, for the adapters' tasks."""
    root, made = tmp_path_factory.mktemp("folders"), {}
    rows = (class_rows, choice_rows, mood_rows)
    kinds = ("classification", "multiple_choice", "classification")
    for name, make, kind in zip(NAMES, rows, kinds, strict=True):
        # Longer by the row, so that a batch has padding.
        own = [row | {"text": f"{'film was ' * (at % 4)}{row['text']}"} for at, row in enumerate(make(14))]
        made[name] = write_task(root / name, {"test": own}, kind)
    return made


@pytest.fixture(scope="session")
def tasks(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same folders as lm-eval's tasks."""
    out = tmp_path_factory.mktemp("lm_eval") / "tasks"
    write_tasks(list(folders.values()), out)
    return {name: out / f"{name}.yaml" for name in folders}


@pytest.fixture
def lm(backbones: dict[str, Path], tmp_path: Path) -> Callable[..., MoePeftLM]:  # noqa: F811
    """Makes lm-eval's model of a tiny trained method."""

    def make(method: str, kind: str = "causal", **given: Any) -> MoePeftLM:
        module = trained(backbones[kind], method, kind, **METHODS[method])
        return MoePeftLM(str(save(module, tmp_path / f"{method}-{kind}.ckpt")), **given)

    return make


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keeps data sets out of the home folder, and lm-eval from reading its fourteen thousand tasks at every start."""
    import datasets
    from lm_eval.tasks.manager import TaskManager

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
    monkeypatch.setattr(TaskManager.__init__, "__defaults__", (None, None, False, None))


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    """Runs the command line in this process."""
    monkeypatch.setattr(sys, "argv", ["lm_eval", *map(str, arguments)])
    command.main()


def ask(model: Any, task: str, *arguments: tuple, kind: str = "loglikelihood") -> list[Any]:
    """Asks a model what lm-eval would."""
    requests = [Instance(kind, {}, own, 0, (task, at, 1)) for at, own in enumerate(arguments)]  # type: ignore
    return getattr(model, kind)(requests, disable_tqdm=True)


def results(out: Path) -> dict[str, Any]:
    """Reads the results file of a run."""
    (file,) = out.rglob("results_*.json")
    return json.loads(file.read_text(encoding="utf-8"))["results"]


def samples(out: Path, task: str) -> list[dict[str, Any]]:
    """Reads what lm-eval logged of every row of a task."""
    (file,) = out.rglob(f"samples_{task}_*.jsonl")
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def predictions(module: Any, folders: dict[str, Path], **data: Any) -> dict[str, Prediction]:
    """What the package's own test says of every row, by `<task>/<id>`."""
    loaded = MultitaskDataModule([str(folder) for folder in folders.values()], module.backbone, **data)
    found = [row for batch in loaded.test_dataloader() for row in predict_rows(module, batch)]
    return {row.row_id: row for row in found}
