"""README's guide to adding a method does what it says: its files are written, its commands run, a row comes out."""

import json
import re
import shlex

import pytest

from tests.conftest import ROOT
from tests.rack.tiny_rack import in_process
from tests.tiny_runs import World, world

__all__ = ["in_process", "world"]
HEADING = "## Add your method"
LONGEST = 60


@pytest.fixture(scope="module")
def guide() -> str:
    """The section of the README."""
    _, found, rest = (ROOT / "README.md").read_text(encoding="utf-8").partition(f"\n{HEADING}\n")
    assert found, f"README.md has no section {HEADING!r}"
    return HEADING + "\n" + re.split(r"\n## ", rest)[0].rstrip()


def blocks(guide: str, language: str) -> list[str]:
    """The fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", guide, re.MULTILINE | re.DOTALL)


def test_it_is_short(guide):
    assert len(guide.splitlines()) <= LONGEST


def test_it_leads_from_an_empty_folder_to_a_row(guide, world, tmp_path, monkeypatch, run_tool, in_process):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for text in [*blocks(guide, "python"), *blocks(guide, "yaml")]:
        name = re.match(r"# (\S+)\n", text)
        assert name, text
        (tmp_path / name.group(1)).write_text(text)
    # A tiny encoder in the real one's place, and made-up rows in the real tasks'.
    backbone = {"class_path": "Classifier", "init_args": {"name": str(world.backbones["classifier"])}}
    World.write(tmp_path / "configs/bases/minilm-l6.yaml", {"model": {"init_args": {"backbone": backbone}}})
    for name, kind in (("sst2", "tone"), ("mrpc", "mood")):
        task = World.task(tmp_path / "folders" / name, kind) / "task.json"
        task.write_text(json.dumps(json.loads(task.read_text()) | {"name": name}))
    commands = [shlex.split(line) for text in blocks(guide, "bash") for line in text.splitlines()]
    for path, python, tool, *given in commands:
        assert (path, python) == ("PYTHONPATH=.", "python") and (ROOT / tool).is_file()
        given = ["folders" if part == "FOLDERS" else part for part in given]
        name = tool.removeprefix("tools/").removesuffix(".py")
        status, out, errors = run_tool(name, *given)
        assert status == 0, errors
    rows = json.loads((tmp_path / "runs/my-compare/compare.json").read_text())["rows"]
    assert [(row["method"], len(row["runs"])) for row in rows] == [("LoRA", 2), ("SharpMix", 2)]
    assert rows[1]["router"]["entropy"] > 0 and len(in_process.commands) == 6
    assert "my_method" in (tmp_path / "runs/my-compare/compare.md").read_text()
