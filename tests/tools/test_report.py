"""The command that writes reports: where the page lies, and a user's mistakes in one line."""

import pytest

from tests.reporting.toy_runs import ToyRun


def test_one_run_is_reported_in_its_own_folder_and_again_over_the_old_page(tmp_path, run_tool):
    toy = ToyRun(tmp_path / "run").write()
    for _ in range(2):
        status, out, errors = run_tool("report", toy.folder)
        assert (status, out, errors) == (0, [f"Written to {toy.folder}/report.html."], [])
    first = (toy.folder / "report.html").read_bytes()
    toy.findings([{"kind": "dead", "layer": "l", "text": "new"}])
    run_tool("report", toy.folder)
    assert (toy.folder / "report.html").read_bytes() != first


def test_the_same_run_gives_the_same_page_to_the_byte(tmp_path, run_tool):
    toy = ToyRun(tmp_path / "run").write()
    for name in ("one", "two"):
        assert run_tool("report", toy.folder, "--out", tmp_path / name)[0] == 0
    assert (tmp_path / "one" / "report.html").read_bytes() == (tmp_path / "two" / "report.html").read_bytes()
    assert not (toy.folder / "report.html").exists()


def test_several_runs_are_compared(tmp_path, run_tool):
    toys = [ToyRun(tmp_path / f"run{seed}", seed=seed).write() for seed in range(2)]
    status, out, errors = run_tool("report", *(toy.folder for toy in toys), "--out", tmp_path / "out")
    assert (status, out, errors) == (0, [f"Written to {tmp_path}/out/comparison.html."], [])


def test_nothing_is_recorded_anew_of_runs_that_cannot_all_be(tmp_path, run_tool, monkeypatch):
    recorded = []
    monkeypatch.setattr("moe_peft.routing.rebuild.record_run", lambda run, **given: recorded.append(run))
    a, b = ToyRun(tmp_path / "a").write(), ToyRun(tmp_path / "b", tasks=["rte"]).write()
    for folder in (a.folder, b.folder):
        (folder / "checkpoints").mkdir()
        (folder / "checkpoints" / "best.ckpt").touch()
    given = ("--rebuild", a.folder, b.folder, "--out", tmp_path / "out")
    status, _, errors = run_tool("report", *given)
    assert (status, recorded) == (2, []) and "compare runs over the same tasks" in errors[0]
    b = ToyRun(tmp_path / "b", seed=1).write()
    (b.folder / "checkpoints" / "best.ckpt").unlink()
    status, _, errors = run_tool("report", *given)
    assert (status, recorded) == (2, []) and f"'{b.folder}' holds no checkpoints/best.ckpt" in errors[0]
    (b.folder / "checkpoints" / "last.ckpt").touch()
    assert run_tool("report", *given)[0] == 0 and recorded == [a.folder, b.folder]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["{run}", "{run}2"], "out: 2 runs are compared; name the folder to write into with --out"),
        (["{run}/routing"], "run: '{run}/routing' has no config.yaml, so it is no run's folder; give what `fit` wrote"),
        (["{run}/nowhere"], "run: '{run}/nowhere' has no config.yaml"),
        (["{run}", "--rows", "3"], "rows: 3 is of use with --rebuild only; add it, or leave --rows out"),
        (["{run}", "--rebuild", "--rows", "0"], "rows: 0 is below 1; give the rows of every task to record"),
        (["{run}", "--rebuild"], "checkpoint: '{run}' holds no checkpoints/best.ckpt or last.ckpt"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(tmp_path, run_tool, given, expected):
    toy = ToyRun(tmp_path / "run").write()
    ToyRun(tmp_path / "run2").write()
    status, out, errors = run_tool("report", *(part.format(run=toy.folder) for part in given))
    assert status == 2 and not out and len(errors) == 1, errors
    assert errors[0].startswith(f"error: {expected.format(run=toy.folder)}")
    assert not (toy.folder / "report.html").exists() and not (toy.folder / "report").exists()
