"""Several runs: grouped by all but the seed, means and spreads right, what cannot be compared refused in a line."""

import csv
import json
from statistics import mean, stdev

import pytest

from moe_peft.reporting.comparison import contestants
from moe_peft.reporting.comparison_page import write_comparison
from moe_peft.reporting.run import Run
from tests.reporting.test_page import HOSTILE, Reader
from tests.reporting.toy_runs import TASKS, ToyRun


@pytest.fixture
def runs(tmp_path):
    """Three seeds of T-REX, two of LoRA."""
    toys = [ToyRun(tmp_path / f"trex{seed}", seed=seed).write() for seed in range(3)]
    toys += [ToyRun(tmp_path / f"lora{seed}", "LoRA", seed=seed).write() for seed in (3, 4)]
    return [Run(toy.folder) for toy in toys]


def test_runs_that_differ_by_seed_and_folder_are_one_contestant(runs):
    found = contestants(runs)
    assert [(one.label, [run.seed for run in one.runs]) for one in found] == [("TRex", [0, 1, 2]), ("LoRA", [3, 4])]


def test_contestants_of_one_method_are_told_apart_by_their_settings(tmp_path):
    models = [{"r1": 4, "r2": 4}, {"r1": 8, "r2": 4}, {"r1": 8, "r2": 4, "a": 1, "b": 2, "c": 3}]
    toys = [ToyRun(tmp_path / str(at), model=model).write() for at, model in enumerate(models)]
    labels = [one.label for one in contestants([Run(toy.folder) for toy in toys])]
    assert labels[0] == "TRex (r1 4, a unset, b unset, 1 more)" and len(set(labels)) == 3
    assert [one.label for one in contestants([Run(toy.folder) for toy in toys[:2]])] == ["TRex (r1 4)", "TRex (r1 8)"]


def test_no_two_contestants_have_the_same_label(tmp_path):
    base = dict.fromkeys("abcd", 1)
    models = [base, base | {"d": 2}, dict.fromkeys("abcd", 2)]
    toys = [ToyRun(tmp_path / str(at), model=model).write() for at, model in enumerate(models)]
    labels = [one.label for one in contestants([Run(toy.folder) for toy in toys])]
    assert labels == ["TRex (a 1, b 1, c 1, d 1)", "TRex (a 1, b 1, c 1, d 2)", "TRex (a 2, b 2, c 2, 1 more)"]


def test_mean_and_spread_are_those_of_the_results(runs, tmp_path):
    write_comparison(runs, tmp_path / "out")
    content = json.loads((tmp_path / "out" / "comparison.json").read_text())
    with (tmp_path / "out" / "comparison.csv").open(newline="") as file:
        table = {(row["contestant"], row["task"]): row for row in csv.DictReader(file)}
    text = Reader((tmp_path / "out" / "comparison.html").read_text()).text
    for one, own in zip(content["contestants"], (runs[:3], runs[3:]), strict=True):
        for task in [*TASKS, "mean"]:
            if task == "mean":
                values = [run.results["rows"]["model"]["mean"] for run in own]
            else:
                values = [run.results["rows"]["model"]["tasks"][task]["value"] for run in own]
            assert one["tasks"].get(task, one["mean"]) == {
                "mean": pytest.approx(mean(values)), "sd": pytest.approx(stdev(values)), "values": values
            }  # fmt: skip
            row = table[one["label"], task]
            assert (float(row["mean"]), float(row["sd"]), row["seeds"]) == (
                pytest.approx(mean(values)), pytest.approx(stdev(values)), str(len(own))
            )  # fmt: skip
            assert f"{100 * mean(values):.1f} ±{100 * stdev(values):.1f}" in text
    assert content["contestants"][0]["wall_seconds"]["mean"] == pytest.approx(175)


def test_a_single_seed_has_no_spread(runs, tmp_path):
    write_comparison(runs[2:4], tmp_path / "out")
    for one in json.loads((tmp_path / "out" / "comparison.json").read_text())["contestants"]:
        assert one["mean"]["sd"] is None and len(one["mean"]["values"]) == 1


def test_an_unfinished_run_is_named_and_in_no_mean(runs, tmp_path):
    (runs[1].folder / "results.json").rename(runs[1].folder / "results.test-last.json")
    again = [Run(run.folder) for run in runs]
    page = write_comparison(again, tmp_path / "out")
    content = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert content["contestants"][0]["mean"]["values"] == [
        run.results["rows"]["model"]["mean"] for run in (runs[0], runs[2])
    ]
    text = Reader(page.read_text()).text
    assert f"Unfinished , so not in the means: {runs[1].folder}." in text
    assert "unfinished, step 30" in text and "TRex 2 of 3 runs" in text


def test_curves_of_a_contestant_are_the_mean_over_its_seeds(runs, tmp_path):
    write_comparison(runs, tmp_path / "out")
    with (tmp_path / "out" / "report" / "compared_curves.csv").open(newline="") as file:
        drawn = [row for row in csv.DictReader(file) if (row["curve"], row["contestant"]) == ("mean of tasks", "TRex")]
    for row in drawn:
        values = [own.value for run in runs[:3] for own in run.history("val/mean") if own.step == int(row["step"])]
        assert len(values) == 3
        expected = [mean(values), min(values), max(values)]
        assert [float(row[name]) for name in ("mean", "low", "high")] == pytest.approx(expected)
    assert len(drawn) == 3


def test_every_picture_is_there_and_a_lora_without_router_is_no_obstacle(runs, tmp_path):
    reader = Reader(write_comparison(runs, tmp_path / "out").read_text())
    assert reader.figures == {"compared_scores", "compared_curves", "compared_routers"}
    reader = Reader(write_comparison(runs[3:], tmp_path / "lora").read_text())
    assert reader.figures == {"compared_scores", "compared_curves"}


def test_runs_of_which_none_is_finished_are_compared_by_their_curves(runs, tmp_path):
    for run in runs:
        (run.folder / "results.json").unlink()
    reader = Reader(write_comparison([Run(run.folder) for run in runs], tmp_path / "out").read_text())
    assert reader.figures == {"compared_curves", "compared_routers"}
    assert "No run is finished, so there are no scores to compare." in reader.text


def test_hostile_names_are_text(tmp_path):
    toys = [ToyRun(tmp_path / f"<b>{seed}", tasks=HOSTILE, seed=seed, base="<i>base").write() for seed in range(2)]
    reader = Reader(write_comparison([Run(toy.folder) for toy in toys], tmp_path / "out").read_text())
    assert not {"script", "b", "i"} & {tag for tag, _ in reader.elements}
    assert all(" ".join(name.split()) in reader.text for name in HOSTILE)


@pytest.mark.parametrize(
    ("other", "rows", "expected"),
    [
        (
            {"tasks": ["sst2", "rte"]},
            250,
            "has the tasks sst2, rte, '{a}' has sst2, arc_easy, csqa; compare runs over the",
        ),
        ({"base": "models/big"}, 250, "is on base 'models/big', '{a}' on 'models/tiny'; compare runs of one base"),
        (
            {},
            100,
            "scored sst2 by accuracy on 100 rows, '{a}' by accuracy on 250; compare runs over the same test rows",
        ),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_is_written(tmp_path, run_tool, other, rows, expected):
    a, b = ToyRun(tmp_path / "a").write(), ToyRun(tmp_path / "b", **other).write()
    b.results(rows=rows)
    status, out, errors = run_tool("report", a.folder, b.folder, "--out", tmp_path / "out")
    assert status == 2 and not out and len(errors) == 1
    assert errors[0].startswith(f"error: runs: '{b.folder}' {expected.format(a=a.folder)}")
    assert not (tmp_path / "out").exists()


def test_the_same_run_twice_is_no_second_seed(tmp_path, run_tool):
    toy = ToyRun(tmp_path / "a").write()
    status, _, errors = run_tool("report", toy.folder, f"{toy.folder}/../a", "--out", tmp_path / "out")
    assert status == 2 and errors == [f"error: runs: '{toy.folder}/../a' is given twice; name every run once"]
