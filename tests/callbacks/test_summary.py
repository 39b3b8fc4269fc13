"""The last words of a run: every path is there, every command runs."""

import json
import shlex
from pathlib import Path

import pytest

from moe_peft.callbacks import summary
from moe_peft.cli import run
from tests.tiny_fits import lora
from tests.tiny_runs import recorded, world  # noqa: F401  (a fixture)

NAMES = ("run", "checkpoints", "checkpoint", "results", "metrics", "routing", "test again", "test", "stopped", "resume",
         "export", "report")  # fmt: skip


def said(text):
    """The summary in what was printed: {name: text}; it is aligned, and comes last."""
    found = [line for line in text.splitlines() if line.split("  ")[0] in NAMES and "  " in line]
    assert text.splitlines()[-len(found) :] == found
    column = len(found[0]) - len(found[0].partition("  ")[2].lstrip())
    assert all(line[column - 2 : column] == "  " and line[column] != " " for line in found), found
    return {line[:column].rstrip(): line[column:] for line in found}


def paths(entry):
    """The files of an entry: the first with its folder."""
    first, *others = entry.split(", ")
    return [Path(first), *(Path(first).parent / other for other in others)]


@pytest.fixture
def fitted(world, tmp_path, capsys):  # noqa: F811
    """A finished run, and what was printed."""
    world.fit(tmp_path / "a run", lora(world.config()))
    return tmp_path / "a run", said(capsys.readouterr().out)


def test_a_fit_ends_with_what_there_is(fitted):
    folder, entries = fitted
    assert entries["run"] == str(folder)
    files = {path for name in ("checkpoints", "results", "metrics") for path in paths(entries[name])}
    assert all(path.exists() for path in files)
    assert {str(path.relative_to(folder)) for path in files} == {
        "checkpoints/best.ckpt", "checkpoints/last.ckpt", "results.md", "results.json", "predictions.jsonl",
        "metrics.csv", "tensorboard",
    }  # fmt: skip
    (folder / "results.md").unlink()
    again = dict(summary.fit_entries(folder))
    assert [path.name for path in paths(again["results"])] == ["results.json", "predictions.jsonl"]


def test_a_fit_without_a_best_checkpoint_names_its_last(fitted):
    folder, _ = fitted
    (folder / "checkpoints" / "best.ckpt").unlink()
    entries = dict(summary.fit_entries(folder))
    assert entries["test again"].endswith("last.ckpt'") and {"export", "report"} <= entries.keys()


def test_the_test_it_names_runs_and_ends_with_its_own_files(fitted, capsys):
    folder, entries = fitted
    run(shlex.split(entries["test again"])[3:])
    again = said(capsys.readouterr().out)
    assert list(again) == ["checkpoint", "results"]
    assert paths(again["checkpoint"]) == [folder / "checkpoints/best.ckpt"]
    assert [path.name for path in paths(again["results"]) if path.exists()] == [
        "results.test-best.md", "results.test-best.json", "predictions.test-best.jsonl",
    ]  # fmt: skip
    rows = [json.loads((folder / name).read_text())["rows"] for name in ("results.json", "results.test-best.json")]
    assert rows[0] == rows[1]


def test_a_resumed_fit_without_a_step_left_ends_with_what_there_is_too(fitted, capsys):
    folder, entries = fitted
    run(["fit", f"--config={folder}/config.yaml", "--ckpt_path=last"])
    assert said(capsys.readouterr().out) == entries


@pytest.mark.parametrize("name", ["export", "report"])
def test_the_tools_it_names_run(fitted, run_tool, monkeypatch, tmp_path, name):
    _, entries = fitted
    python, tool, *arguments = shlex.split(entries[name])
    assert python == "python" and Path(tool).is_file()
    monkeypatch.chdir(tmp_path)
    status, _, errors = run_tool(Path(tool).stem, *arguments)
    assert status in (0, None), errors


def broken_off(world, folder, step):  # noqa: F811
    """A fit that ends with an error before a step."""
    config = lora(world.config())
    config["trainer"]["callbacks"][-1]["init_args"] = {"stop_at": step}
    with pytest.raises(RuntimeError, match="killed"):
        world.fit(folder, config)


def test_a_fit_that_broke_off_says_how_to_go_on(world, tmp_path, capsys, monkeypatch):  # noqa: F811
    broken_off(world, tmp_path / "run", 8)
    entries = said(capsys.readouterr().out)
    assert list(entries) == ["stopped", "resume"] and entries["stopped"] == "at step 8 of 12"
    before = len(recorded(tmp_path / "run"))
    monkeypatch.setattr("tests.tiny_runs.Recorder.on_train_batch_start", lambda *_: None)
    run(shlex.split(entries["resume"])[3:])
    assert [line["batch"] for line in recorded(tmp_path / "run")[before:]] == list(range(6, 12))
    assert (tmp_path / "run/results.json").is_file()


def test_a_fit_that_broke_off_at_once_has_nothing_to_go_on_from(world, tmp_path, capsys):  # noqa: F811
    broken_off(world, tmp_path / "run", 2)
    entries = said(capsys.readouterr().out)
    assert entries == {"stopped": "at step 2 of 12", "resume": "nothing was saved yet; start again in another folder"}


def test_a_test_that_broke_off_after_its_fit_can_be_repeated(world, tmp_path, capsys, monkeypatch):  # noqa: F811
    from moe_peft.callbacks.results import Results

    def fail(*_):
        raise RuntimeError("full")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="full"):
        patch.setattr(Results, "on_test_end", fail)
        world.fit(tmp_path / "run", lora(world.config()))
    entries = said(capsys.readouterr().out)
    assert list(entries) == ["test"]
    run(shlex.split(entries["test"])[3:])
    assert (tmp_path / "run/results.test-best.json").is_file()


def test_other_ranks_and_quick_trials_say_nothing(world, tmp_path, capsys, monkeypatch):  # noqa: F811
    (tmp_path / "run").mkdir()
    world.fit(tmp_path / "run", lora(world.config()), "--trainer.fast_dev_run=true")
    assert "metrics.csv" not in capsys.readouterr().out

    class Trainer:
        is_global_zero, fast_dev_run, default_root_dir = False, False, tmp_path

    said_by = summary.Summary()
    said_by.on_train_start(Trainer, None)  # type: ignore[arg-type]
    said_by.teardown(Trainer, None, "test")  # type: ignore[arg-type]
    said_by.on_exception(Trainer, None, ValueError())  # type: ignore[arg-type]
    assert capsys.readouterr().out == ""
