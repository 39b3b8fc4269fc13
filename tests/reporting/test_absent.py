"""What a page says of what its run does not have: how to get it, or that there is nothing to get."""

import csv

import pytest

from moe_peft.reporting.page import write_report
from moe_peft.reporting.run import Run
from tests.reporting.test_page import ALWAYS, PICTURES, Reader, numbers, reports
from tests.reporting.toy_runs import TASKS, ToyRun

FIXTURES = (reports,)


def test_a_run_that_holds_nothing_yet_says_what_is_not_there_and_how_to_get_it(tmp_path):
    toy = ToyRun(tmp_path / "my run")
    toy.config()
    reader = Reader(write_report(Run(toy.folder)).read_text(encoding="utf-8"))
    assert reader.figures == set()
    assert "Unfinished : this run has no results.json. Go on with" in reader.text
    assert f"python -m moe_peft fit --config '{toy.folder}'/config.yaml --ckpt_path last" in reader.text
    assert "No routing was recorded, so there is no picture of who serves which task" in reader.text
    assert f"python tools/report.py --rebuild '{toy.folder}' makes it." in reader.text
    assert "Not recorded: entropy and mutual information, each layer's gates, which clusters of the" in reader.text
    assert "There are no results: the run was not tested." in reader.text
    assert "checkpoints/last.ckpt tests its last checkpoint." in reader.text
    assert "There is no metrics.csv" in reader.text
    assert "steps unknown" in reader.text
    toy.table("metrics.csv", "step,epoch,name,value", [(0, 0, "routing/entropy", 0.5)])
    text = Reader(write_report(Run(toy.folder)).read_text(encoding="utf-8")).text
    assert "There are no curves in metrics.csv yet." in text and "steps 0" in text
    (toy.folder / "checkpoints").mkdir()
    (toy.folder / "checkpoints" / "best.ckpt").touch()
    text = Reader(write_report(Run(toy.folder)).read_text(encoding="utf-8")).text
    assert "checkpoints/best.ckpt tests its best checkpoint." in text


@pytest.mark.parametrize(
    ("method", "absent", "gone"),
    [
        ("TRex", "routing/use.csv", {"expert_use", "expert_use_by_layer"}),
        ("TRex", "routing/summary.csv", {"router_history", "layers"}),
        ("TRex", "routing/gates.csv", {"gates"}),
        ("TRex", "routing/clusters.csv", {"clusters"}),
        ("TRex", "routing/embedding.csv", {"task_map"}),
        ("TRex", "routing/findings.json", set()),
        ("TRex", "metrics.csv", {"losses", "learning_curves"}),
        ("TRex", "results.json", {"scores"}),
        ("TTLoRAMoE", "routing/confidence.csv", {"router_confidence"}),
    ],
)
def test_each_file_may_be_absent_by_itself(tmp_path, method, absent, gone):
    toy = ToyRun(tmp_path / "run", method).write()
    (toy.folder / absent).unlink()
    reader = Reader(write_report(Run(toy.folder)).read_text(encoding="utf-8"))
    assert reader.figures == PICTURES[method] - gone
    assert ("Unfinished" in reader.text) == (absent == "results.json")


def test_more_without_rank_report_has_its_ranks_from_the_routing(tmp_path):
    toy = ToyRun(tmp_path / "run", "MoRE").write()
    (toy.folder / "routing" / "ranks.csv").unlink()
    reader = Reader(write_report(Run(toy.folder)).read_text(encoding="utf-8"))
    assert reader.figures == PICTURES["MoRE"]
    with (toy.folder / "routing" / "use.csv").open(newline="") as file:
        used = [row for row in csv.DictReader(file) if row["split"] == "test" and row["chosen"] == "1"]
    recorded = {(row["task"], row["layer"]): row["expert"] for row in used}
    rows = numbers(toy.folder, "rank_table")
    assert {(row["task"], row["linear"]): f"r{row['rank']}" for row in rows} == recorded
    assert len(rows) == len(recorded) == 3 * 12


def test_a_router_without_its_confusion_table_has_it_from_the_routing(tmp_path):
    toy = ToyRun(tmp_path / "run", "TTLoRAMoE").write()
    (toy.folder / "routing" / "confusion.csv").unlink()
    reader = Reader(write_report(Run(toy.folder)).read_text(encoding="utf-8"))
    assert reader.figures == PICTURES["TTLoRAMoE"]
    rows = {(row["task"], row["expert"]): float(row["rows"]) for row in numbers(toy.folder, "router_confusion")}
    assert rows == {(task, expert): 100.0 * (task == expert) for task in TASKS for expert in [*TASKS, "none"]}


def test_lora_says_that_it_routes_nothing(reports):
    text = Reader((reports["LoRA"].folder / "report.html").read_text(encoding="utf-8")).text
    assert "LoRA has no router: nothing decides who serves a row." in text
    assert "rebuild" not in text


def test_rows_that_go_to_their_own_experts_are_no_routing_that_was_missed(tmp_path):
    toy = ToyRun(tmp_path / "run", "TTLoRAMoE", model={"routing": "oracle"})
    for write in (toy.config, toy.results, toy.metrics):
        write()
    reader = Reader(write_report(Run(toy.folder)).read_text(encoding="utf-8"))
    assert reader.figures == ALWAYS
    assert "sends every row to its own task's expert (routing: oracle): nothing to route." in reader.text
    assert "rebuild" not in reader.text
