"""Whole comparisons of tiny models: what is written, and how they go on after they broke off."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml

from moe_peft.rack import fits
from moe_peft.rack.command import compare
from moe_peft.rack.lock import locked
from moe_peft.rack.preparing import prepare
from moe_peft.rack.tables import write_tables
from moe_peft.reporting.run import Run
from moe_peft.reporting.theme import SERIES
from tests.rack.tiny_rack import in_process, rack
from tests.tiny_kills import ROOT, recorded
from tests.tiny_runs import RECORDER, files, world

__all__ = ["in_process", "rack", "world"]


@pytest.fixture
def done(rack, in_process):
    """A finished comparison of LoRA and T-REX at T-REX's size, with two seeds and rates."""
    file = rack.write(budget="trex", seeds=[0, 1], learning_rates=[0.001, 0.01])
    said = []
    page = compare(prepare(file), say=said.append)
    return file, page, said


def test_a_comparison_writes_its_tables_once_and_runs_nothing_again(rack, in_process, done):
    file, page, said = done
    assert page == rack.out / "compare.html" and len(said) == 6 and len(in_process.commands) == 6
    content = json.loads((rack.out / "compare.json").read_text())
    assert [row["tag"] for row in content["rows"]] == ["lora", "trex"]
    for row in content["rows"]:
        check_row(row, content)
    assert content["rows"][0]["paired"] is None and content["rows"][0]["router"] == {}
    assert content["rows"][1]["adapter_parameters"] == content["budget"]
    assert 0 < content["rows"][1]["router"]["entropy"] <= 1
    with (rack.out / "compare.csv").open(newline="") as table:
        lines = list(csv.DictReader(table))
    assert [float(line["mean"]) for line in lines] == [row["mean"]["mean"] for row in content["rows"]]
    text = (rack.out / "compare.md").read_text()
    assert all(row["runs"][0]["run"] in text and row["runs"][0]["commits"][0] in text for row in content["rows"])
    assert "<script" not in page.read_text() and "src=" not in page.read_text()
    before = files(rack.out / "runs")
    assert compare(prepare(file), say=said.append) == page and len(said) == 6 and len(in_process.commands) == 6
    assert files(rack.out / "runs") == before


def test_more_rows_than_colours_are_drawn_task_by_task(rack, done, monkeypatch):
    few = done[1].read_text()
    assert all(f'id="{name}"' in few for name in ("compared_scores", "compared_curves", "compared_routers"))
    assert 'id="compared_tasks"' not in few
    monkeypatch.setattr("moe_peft.rack.page.SERIES", SERIES[:1])
    for results in rack.out.glob("runs/lora/*/results.json"):
        content = json.loads(results.read_text())
        content["rows"]["model"]["mean"] += 0.1
        results.write_text(json.dumps(content))
    file = rack.write(["trex", "lora"], budget="trex", seeds=[0, 1], learning_rates=[0.001, 0.01])
    many = write_tables(prepare(file), rack.out).read_text()
    assert 'id="compared_tasks"' in many and "lora and the best 0 others" in many
    assert not any(f'id="{name}"' in many for name in ("compared_scores", "compared_routers"))
    trex, lora = json.loads((rack.out / "compare.json").read_text())["rows"]
    with (rack.out / "report" / "compared_tasks.csv").open(newline="") as table:
        drawn = {line["task"]: (line["tag"], float(line["difference"])) for line in csv.DictReader(table)}
    assert drawn == {task: ("trex", pytest.approx(own)) for task, own in trex["paired"]["tasks"].items()}
    with (rack.out / "report" / "compared_curves.csv").open(newline="") as table:
        assert {line["contestant"] for line in csv.DictReader(table)} == {"lora"}
    assert lora["mean"]["mean"] > trex["mean"]["mean"]  # who is the second in the file
    shown = [line.split()[1] for line in (rack.out / "compare.md").read_text().splitlines() if line.startswith("| ")]
    assert [tag for tag in shown if tag in ("lora", "trex")][:2] == ["lora", "trex"]


def check_row(row, content):
    """Every number of a row is what its runs say."""
    runs = [Run(each["run"]) for each in row["runs"]]
    means = [run.results["rows"]["model"]["mean"] for run in runs]
    assert row["mean"]["values"] == means and row["mean"]["stderr"] == pytest.approx(abs(means[0] - means[1]) / 2)
    best = max(row["tried"], key=lambda one: one["validation"])
    assert row["learning_rate"] == best["learning_rate"] and row["runs"][0]["run"] == best["run"]
    assert [run.model["optimizer"]["init_args"]["lr"] for run in runs] == [row["learning_rate"]] * 2
    assert [run.seed for run in runs] == content["seeds"]
    assert row["adapter_parameters"] >= content["budget"]
    assert row["trainable_parameters"] == row["adapter_parameters"]  # a decoder has no heads
    assert (
        row["deployed_parameters"] >= row["adapter_parameters"] and row["stored_bytes"] >= 4 * row["adapter_parameters"]
    )
    assert row["flops_per_token"]["adapters"] == pytest.approx(2 * row["adapter_parameters"], rel=0.01)
    assert row["step_seconds"] > 0 and row["peak_bytes"] > 2**20


def test_the_command_line_stands_above_the_yaml_and_below_what_is_decided(rack, in_process):
    more = ["--model.init_args.optimizer.init_args.lr", "0.5", "--model.init_args.rank=7", "--trainer.max_epochs=1"]
    compare(prepare(rack.write(["lora"], budget=3000, learning_rates=[0.001]), more))
    (folder,) = rack.out.glob("runs/lora/*")
    run, row = Run(folder), json.loads((rack.out / "compare.json").read_text())["rows"][0]
    assert run.model["optimizer"]["init_args"]["lr"] == 0.001 and run.config["trainer"]["max_epochs"] == 1
    assert run.model["rank"] != 7 and run.results["trainable_parameters"] == row["adapter_parameters"] >= 3000


def test_a_fit_that_broke_off_goes_on_and_one_without_a_checkpoint_begins_anew(rack, in_process, monkeypatch):
    recorder = {"class_path": RECORDER, "init_args": {"stop_at": 9}}
    rack.common["trainer"]["callbacks+"] = [recorder]
    file = rack.write(["lora"])
    with pytest.raises(RuntimeError, match="killed"):
        compare(prepare(file))
    (folder,) = rack.out.glob("runs/lora/seed0-*")
    assert [line["step"] for line in recorded(folder)][-1] == 9
    go_on = json.loads((folder / "rack.json").read_text())["seconds"]
    recorder["init_args"]["stop_at"] = None
    digest = folder.name.rpartition("-")[2]
    monkeypatch.setattr("moe_peft.rack.contest.digest", lambda *_: digest)  # the same fit, but for what broke it
    compare(prepare(rack.write(["lora"])))
    assert "--ckpt_path=last" in in_process.commands[-1]
    steps = [line["batch"] for line in recorded(folder)]
    assert steps[:9] == list(range(9)) and 0 < steps[9] <= 9 and steps[-1] == 11
    assert json.loads((folder / "rack.json").read_text())["seconds"] > go_on
    about = json.loads((folder / "rack.json").read_text())
    (folder / "rack.json").write_text(json.dumps(about | {"finished": False}))
    for checkpoint in (folder / "checkpoints").iterdir():
        checkpoint.unlink()
    compare(prepare(rack.write(["lora"])))
    assert "--ckpt_path=last" not in in_process.commands[-1]
    assert [line["batch"] for line in recorded(folder)] == list(range(12))


def test_two_comparisons_do_not_write_one_folder_and_a_lock_left_behind_is_none(rack, in_process, run_tool):
    file = rack.write(["lora"])
    rack.out.mkdir()
    (rack.out / ".lock").write_text("process 1 on elsewhere\n")
    with locked(rack.out):
        status, _, errors = run_tool("compare", file)
        assert status == 2 and errors[0].startswith(
            f"error: out: '{rack.out}' is being written by process {os.getpid()} on "
        )
        assert not in_process.commands
    assert run_tool("compare", file)[0] == 0 and len(in_process.commands) == 1


def test_a_fit_that_outlives_its_comparison_keeps_the_folder(tmp_path):
    with locked(tmp_path) as lock:
        fit = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=[lock])
    with pytest.raises(ValueError, match="is being written by process"), locked(tmp_path):
        pass
    fit.communicate(b"\n")
    with locked(tmp_path):
        pass


def test_a_process_that_is_told_to_end_is_waited_for(tmp_path):
    script = "import signal, time, sys; signal.signal(signal.SIGTERM, lambda *_: (print('saved'), sys.exit(143)))"
    command = [sys.executable, "-uc", f"{script}; print('up'); time.sleep(60)"]
    log = tmp_path / "log"
    own = f"""
import signal, sys
from pathlib import Path
from moe_peft.rack.command import told_to_end
from moe_peft.rack.fits import supervised
with told_to_end():
    try:
        supervised({command!r}, Path({str(log)!r}), sys.stdout.fileno())
    except KeyboardInterrupt:
        sys.exit(Path({str(log)!r}).read_text().split() != ["up", "saved"])
"""
    process = subprocess.Popen([sys.executable, "-c", own], cwd=ROOT)
    deadline = time.monotonic() + 60
    while not (log.exists() and "up" in log.read_text()):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0


def hears_interrupts():
    """Undoes what a shell does to commands in the background, tests among them: they are deaf to Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.slow
def test_the_tool_goes_on_after_ctrl_c(rack):
    rack.common["trainer"] |= {"callbacks+": [{"class_path": RECORDER, "init_args": {"pause": 0.3}}]}
    file = rack.write(["lora", "trex"])
    command = [sys.executable, "tools/compare.py", str(file)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, preexec_fn=hears_interrupts
    )
    deadline = time.monotonic() + 120
    while not any(rack.out.glob("runs/lora/*/checkpoints/last.ckpt")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60)[0] == "stopped; the same command goes on\n" and process.returncode == 130
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    assert [line[:12] for line in done.stdout.splitlines()] == ["[1/2] lora, ", "[2/2] trex, ", "Written to /"]
    (log,) = rack.out.glob("runs/lora/*/rack.log")
    assert "SIGTERM: stopped at step" in log.read_text()
    batches = [line["batch"] for line in recorded(log.parent)]
    assert sorted(set(batches)) == list(range(12)) and len(batches) <= 13


def test_what_a_fit_said_last_is_its_error(tmp_path):
    log = tmp_path / "log"
    log.write_text("step 1\nerror: bad\nstopped  at step 1\n\n")
    before = log.stat().st_size
    assert fits.last_words(log) == "bad"
    log.write_text(log.read_text() + "step 2\nkilled\n")
    assert fits.last_words(log, before) == "killed"


def test_a_fit_is_finished_when_all_of_it_is_written_and_names_every_commit(rack, in_process, monkeypatch):
    file = rack.write(["lora"])
    compare(prepare(file))
    (about,) = rack.out.glob("runs/lora/*/rack.json")
    content = json.loads(about.read_text())
    about.write_text(json.dumps(content | {"finished": False}))  # killed behind results.json
    (about.parent / "predictions.jsonl").unlink()
    monkeypatch.setattr(fits, "commit", lambda: "another")
    compare(prepare(file))
    again = json.loads(about.read_text())
    assert again["finished"] and again["commits"] == [*content["commits"], "another"]
    assert (about.parent / "predictions.jsonl").is_file() and len(in_process.commands) == 2


def test_a_row_says_what_sets_it_apart(rack, in_process):
    methods = ["lora", {"method": "trex", "sized": False}]
    compare(prepare(rack.write(methods, budget=6000, seeds=[0])))
    compare_again = prepare(rack.write(methods, budget=6000, seeds=[0, 1]))
    write_tables(compare_again, rack.out)
    content = json.loads((rack.out / "compare.json").read_text())
    assert all("Not run yet" not in (rack.out / f"compare.{kind}").read_text() for kind in ("md", "html"))
    share = content["rows"][1]["adapter_parameters"] / 6000
    text = (rack.out / "compare.md").read_text()
    assert share < 0.95 and f"| trex ({share:.2g} × the budget, 1 of 2 seeds) |" in text
    assert "| lora (1 of 2 seeds) |" in text and "A standard error over 2 seeds is itself uncertain" in text
    assert content["rows"][0]["step_rows"] == 8 and "chosen on validation" not in text


def test_what_is_not_there_is_named_on_every_page(rack, in_process):
    compare(prepare(rack.write(["lora"])))
    write_tables(prepare(rack.write(["lora", "trex"])), rack.out)
    assert json.loads((rack.out / "compare.json").read_text())["missing"] == ["trex"]
    assert all("Not run yet: trex." in (rack.out / f"compare.{kind}").read_text() for kind in ("md", "html"))


@pytest.mark.parametrize("seed", [0, 1])
def test_a_seed_that_diverged_is_named_and_the_others_count(rack, in_process, seed):
    file = rack.write(["lora", "trex"], seeds=[0, 1])
    compare(prepare(file))
    (about,) = rack.out.glob(f"runs/trex/seed{seed}-*/rack.json")
    content = json.loads(about.read_text())
    about.write_text(json.dumps(content | {"finished": False, "failed": "the loss is not finite"}))
    compare(prepare(file))
    assert len(in_process.commands) == 4
    row = json.loads((rack.out / "compare.json").read_text())["rows"][1]
    assert row["failed"] == [{"run": str(about.parent), "seed": seed, "said": "the loss is not finite"}]
    assert [own["seed"] for own in row["runs"]] == [1 - seed] and len(row["mean"]["values"]) == 1
    shown = [(rack.out / f"compare.{kind}").read_text() for kind in ("md", "html")]
    assert all("trex (1 of 2 seeds, 1 diverged)" in text for text in shown)


def test_a_comparison_goes_on_where_its_base_has_moved(rack, in_process, world):
    base, place = yaml.safe_load(rack.base.read_text()), rack.root / "bases" / "tiny"
    shutil.copytree(world.backbones["causal"], place)
    base["model"]["init_args"]["backbone"]["init_args"]["name"] = str(place)
    world.write(rack.base, base)
    compare(prepare(rack.write(["lora"])))
    moved = place.rename(rack.root / "moved")
    base["model"]["init_args"]["backbone"]["init_args"]["name"] = str(moved)
    world.write(rack.base, base)
    compare(prepare(rack.write(["lora", "trex"])))
    content = json.loads((rack.out / "compare.json").read_text())
    assert len(in_process.commands) == 2 and content["base"] == str(moved)
    assert all(row["flops_per_token"]["adapters"] > 0 for row in content["rows"])


def test_a_fit_that_tests_nothing_is_not_finished(rack, in_process):
    with pytest.raises(ValueError, match="lora, seed 0: the fit ended without a test; leave out what keeps it from on"):
        compare(prepare(rack.write(["lora"]), ["--trainer.fast_dev_run=true"]))
    (about,) = rack.out.glob("runs/lora/*/rack.json")
    assert json.loads(about.read_text())["finished"] is False
