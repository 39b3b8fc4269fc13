"""RoutingReport in whole runs: planted faults are found, files equal a recount, and nothing else changes."""

import csv
import json
import logging
import shutil

import pytest
import torch

from moe_peft.callbacks.routing_report import RoutingReport
from moe_peft.cli import run
from moe_peft.routing.rebuild import record_run, step_of
from tests.routing.tiny_routing import COLLAPSED, DEAD, information, recount, reporting, table
from tests.tiny_fits import fit_of, lora, retest
from tests.tiny_kills import finish, start
from tests.tiny_runs import files, metrics, recorded, results, world  # noqa: F401  (a fixture)

EVERY = {"rows_per_task": 100, "every_n_steps": 2}
STEPS = 12


def planted(world):  # noqa: F811
    """A T-REX whose routing has a dead expert and a collapsed layer, and learns nothing."""
    config = reporting(world.config(), **EVERY)
    config["trainer"]["callbacks"].append({"class_path": "tests.routing.tiny_routing.Plant"})
    config["model"]["init_args"] |= {"clusters": 4}
    config["model"]["init_args"]["optimizer"]["init_args"]["lr"] = 0.0
    return config


faulty = fit_of(planted)


# ---- what it must show ----------------------------------------------------------------------------------------------


def test_a_dead_expert_and_a_collapsed_layer_are_found(faulty):
    found = json.loads((faulty / "routing" / "findings.json").read_text())
    named = {(each["kind"], each["layer"], each["expert"]) for each in found}
    assert named == {("dead", DEAD, "1,1"), ("collapsed", COLLAPSED, "0,2")}
    assert {each["kind"]: each["share"] for each in found} == pytest.approx({"dead": 0.0, "collapsed": 1.0})
    assert all(each["layer"] in each["text"] and each["expert"] in each["text"] for each in found)


def test_the_log_names_them_once_per_split(world, tmp_path, caplog):  # noqa: F811
    with caplog.at_level(logging.WARNING, logger="moe_peft.callbacks.routing_report"):
        world.fit(tmp_path / "run", planted(world))
    said = [each.getMessage() for each in caplog.records if each.name == "moe_peft.callbacks.routing_report"]
    assert [line.split(" rows")[0] for line in said] == ["routing of validation", "routing of test"]
    for line in said:
        assert f"1,1 of {DEAD}" in line and f"0,2 of {COLLAPSED}" in line


@pytest.mark.parametrize("split", ["validation", "test"])
def test_the_files_equal_a_recount_of_the_raw_routing(faulty, split):
    uses, entropies = recount(faulty, split)
    lines = [line for line in table(faulty / "routing" / "use.csv") if line["split"] == split]
    assert len(lines) == len(uses) == 2 * len(entropies) * 6
    for line in lines:
        i, j = map(int, line["expert"].split(","))
        weight, chosen, tokens = uses[line["task"], line["layer"], str(3 * i + j)]
        assert float(line["weight"]) == pytest.approx(weight, abs=1e-5)
        assert float(line["chosen"]) == pytest.approx(chosen, abs=2e-2)  # rounding may turn a tie
        assert int(line["tokens"]) == tokens
    summary = [line for line in table(faulty / "routing" / "summary.csv") if line["split"] == split]
    summary = summary[-len(entropies) - 1 :]
    assert {line["layer"] for line in summary} == {*entropies, "all"}
    for line in summary[:-1]:
        assert float(line["entropy"]) == pytest.approx(entropies[line["layer"]], abs=1e-5)
        assert float(line["mutual_information"]) == pytest.approx(information(uses, line["layer"]), abs=1e-5)
    everything = summary[-1]
    assert everything["layer"] == "all"
    for name in ("entropy", "mutual_information"):
        mean = sum(float(line[name]) for line in summary[:-1]) / len(entropies)
        assert float(everything[name]) == pytest.approx(mean, abs=2e-6)
    assert (int(everything["dead"]), everything["collapsed"]) == (1 + 5, "1")


def test_what_a_run_recorded_is_recorded_again_from_its_checkpoint(faulty, tmp_path):
    shutil.copytree(faulty, tmp_path / "run")
    (tmp_path / "run" / "routing" / "findings.json").unlink()
    for name in ("use", "clusters", "embedding", "gates", "summary"):
        (tmp_path / "run" / "routing" / f"{name}.csv").unlink()
    record_run(tmp_path / "run", rows_per_task=100)
    before, after = files(faulty / "routing"), files(tmp_path / "run" / "routing")
    assert before.keys() == after.keys()
    for name in ("findings.json", "clusters.csv", "embedding.csv"):
        assert after[name] == before[name], name
    step = step_of(faulty / "checkpoints" / "best.ckpt")
    of_step = [line for line in before["summary.csv"].splitlines() if line.startswith((b"step", b"%d," % step))]
    assert [line for line in of_step if b"train" not in line] == after["summary.csv"].splitlines()
    tested = ([line for line in text["use.csv"].splitlines() if b",test," in line] for text in (before, after))
    assert len(set(map(tuple, tested))) == 1


def test_more_rows_may_be_recorded_of_one_split(faulty, tmp_path):
    shutil.copytree(faulty, tmp_path / "run")
    record_run(tmp_path / "run", splits=["train"], rows_per_task=3)
    tokens = {line["tokens"] for line in table(tmp_path / "run/routing/use.csv") if line["split"] == "train"}
    assert all(0 < int(count) < 100 for count in tokens)


# ---- over training --------------------------------------------------------------------------------------------------


def test_every_watched_step_and_validation_has_its_lines(faulty):
    summary = table(faulty / "routing" / "summary.csv")
    best = step_of(faulty / "checkpoints" / "best.ckpt")
    for split, steps in (("train", range(0, STEPS, 2)), ("validation", (6, 12)), ("test", (best,))):
        overall = [line for line in summary if line["split"] == split and line["layer"] == "all"]
        assert [int(line["step"]) for line in overall] == list(steps), split
    for name in ("entropy", "mutual_information", "dead", "collapsed"):
        values = metrics(faulty, f"routing/{name}")
        assert [step for step, _ in values] == list(range(0, STEPS, 2))
        lines = [line for line in summary if line["split"] == "train" and line["layer"] == "all"]
        assert [float(value) for _, value in values] == pytest.approx([float(line[name]) for line in lines], abs=1e-6)
        assert [step for step, _ in metrics(faulty, f"routing/val_{name}")] == [6, 12]


def test_the_gates_of_every_validation_are_kept(faulty):
    gates = table(faulty / "routing" / "gates.csv")
    assert {line["step"] for line in gates} == {"6", "12"}
    found = {line["layer"]: line for line in gates}
    assert float(found[DEAD]["omega"]) == 0.0 and float(found["model.layers.1.self_attn.q_proj"]["omega"]) == 0.5


def test_shares_and_tokens_are_whole(faulty):
    shares, rows = {}, {}
    for line in table(faulty / "routing" / "use.csv"):
        key = line["split"], line["task"], line["layer"]
        weight, chosen = shares.get(key, (0.0, 0.0))
        shares[key] = weight + float(line["weight"]), chosen + float(line["chosen"])
    assert len(shares) == 3 * 2 * 14
    assert all(pair == pytest.approx((1, 1), abs=1e-5) for pair in shares.values())
    for line in table(faulty / "routing" / "clusters.csv"):
        key = line["split"], line["task"]
        rows[key] = rows.get(key, 0) + int(line["rows"])
    assert rows == {(split, task): n for split, n in (("validation", 5), ("test", 9)) for task in ("tone", "next")}


# ---- what it must leave alone ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["TRex", "MoRE", "TTLoRAMoE"])
def test_a_fit_is_the_same_without_it(world, tmp_path, method):  # noqa: F811
    found = []
    for name, arguments in (("with", {"rows_per_task": 3, "every_n_steps": 1}), ("without", dict.fromkeys(EVERY, 0))):
        world.fit(tmp_path / name, reporting(world.config(method=method), **arguments))
        with (tmp_path / name / "metrics.csv").open() as file:
            lines = [line for line in csv.reader(file) if not line[2].startswith("routing/")]
        kept = torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        predictions = (tmp_path / name / "predictions.jsonl").read_text()
        found.append((recorded(tmp_path / name), lines, predictions, kept))
    (rows, lines, predictions, kept), without = found
    assert len(rows) == STEPS and (rows, lines, predictions) == without[:3]
    assert kept.keys() == without[3].keys() and all(torch.equal(own, without[3][name]) for name, own in kept.items())
    assert (tmp_path / "with" / "routing" / "use.csv").is_file()
    assert not (tmp_path / "without" / "routing" / "use.csv").exists()


def test_a_fit_that_was_killed_goes_on_with_its_files(world, tmp_path):  # noqa: F811
    config = reporting(world.config(), **EVERY)
    world.fit(tmp_path / "whole", config)
    config["trainer"]["callbacks"][1]["init_args"] = {"stop_at": 9}
    more = "--checkpoint.every_n_train_steps=4"
    with pytest.raises(RuntimeError, match="killed"):
        world.fit(tmp_path / "run", config, more)
    left = table(tmp_path / "run" / "routing" / "summary.csv")
    assert {line["step"] for line in left if line["split"] == "train"} == {"0", "2", "4", "6"}, "up to the checkpoint"
    world.fit(tmp_path / "run", reporting(world.config(), **EVERY), "--ckpt_path=last", more)
    for name in ("summary.csv", "gates.csv", "clusters.csv", "embedding.csv", "findings.json"):
        whole, own = ((tmp_path / folder / "routing" / name).read_text() for folder in ("whole", "run"))
        assert sorted(own.splitlines()) == sorted(whole.splitlines()), name
    whole, own = (table(tmp_path / folder / "routing" / "use.csv") for folder in ("whole", "run"))
    assert [line for line in own if line["split"] != "train"] == [line for line in whole if line["split"] != "train"]


def test_what_came_after_the_checkpoint_is_dropped(faulty, world, tmp_path):  # noqa: F811
    folder = copy_of(faulty, tmp_path / "run")
    report = RoutingReport()

    class Trainer:
        is_global_zero, fast_dev_run, ckpt_path, global_step, default_root_dir = True, False, "some", 7, str(folder)

    report.on_train_start(Trainer(), None)
    for name in ("summary.csv", "gates.csv"):
        steps = {int(line["step"]) for line in table(folder / "routing" / name)}
        assert steps and max(steps) <= 7, name


def test_lora_routes_nothing(world, tmp_path):  # noqa: F811
    world.fit(tmp_path / "run", lora(world.config()))
    assert not (tmp_path / "run" / "routing").exists()
    record_run(tmp_path / "run")
    assert not (tmp_path / "run" / "routing").exists()


def test_a_trial_run_writes_nothing(world, tmp_path):  # noqa: F811
    config = world.config()
    config["trainer"]["callbacks"].pop()  # the Recorder, which wants a folder
    world.fit(tmp_path / "run", config, "--trainer.fast_dev_run=2")
    assert not list(tmp_path.rglob("use.csv"))


def test_accumulated_micro_batches_are_one_step(world, tmp_path):  # noqa: F811
    tokens = []
    for steps in (1, 4):
        config = reporting(world.config(), rows_per_task=0, every_n_steps=1)
        config["trainer"] |= {"accumulate_grad_batches": steps, "max_steps": 1}
        config["model"]["init_args"]["dropout"] = 0.0
        world.fit(tmp_path / f"run{steps}", config)
        tokens.append(table(tmp_path / f"run{steps}" / "routing" / "use.csv"))
    assert [line["tokens"] for line in tokens[0]] == [line["tokens"] for line in tokens[1]]
    whole, parts = ([float(line["weight"]) for line in lines] for lines in tokens)
    assert parts == pytest.approx(whole, abs=1e-5)


# ---- other methods and commands -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mixture(world, tmp_path_factory):  # noqa: F811
    """The run folder of a TT-LoRA MoE with a null expert."""
    folder = tmp_path_factory.mktemp("mixture") / "run"
    config = reporting(world.config(method="TTLoRAMoE"), **EVERY)
    config["trainer"]["callbacks"].append({"class_path": "NullExpert", "init_args": {"keep": 0.6}})
    config["trainer"]["callbacks"].append({"class_path": "RoutingConfusion"})
    world.fit(folder, config)
    return folder


def test_a_mixtures_choice_is_reported_with_its_null_expert(mixture):
    used = table(mixture / "routing" / "use.csv")
    assert {line["layer"] for line in used} == {"all"} and {line["split"] for line in used} == {"validation", "test"}
    chosen = {(line["task"], line["expert"]): float(line["chosen"]) for line in used if line["split"] == "test"}
    assert {expert for _, expert in chosen} == {"tone", "next", "none"}
    for line in table(mixture / "routing" / "confusion.csv"):
        counts = {name: int(count) for name, count in line.items() if name != "task"}
        for name, count in counts.items():
            assert chosen[line["task"], name] == pytest.approx(count / sum(counts.values()), abs=1e-6)


def test_every_row_has_its_confidence_however_few_are_recorded(mixture, tmp_path):
    folder = copy_of(mixture, tmp_path / "run", ("rows_per_task: 100", "rows_per_task: 2"))
    (folder / "routing" / "use.csv").unlink()
    run(retest(folder))
    assert {line["tokens"] for line in table(folder / "routing/use.csv") if line["split"] == "test"} == {"2"}
    bins = [line for line in table(folder / "routing" / "confidence.csv") if line["split"] == "test"]
    assert len(bins) == 20 and sum(int(line["rows"]) for line in bins) == 18
    rows = [json.loads(line)["routing"] for line in (mixture / "predictions.jsonl").read_text().splitlines()]
    right = sum(not any(name.startswith("as_task") for name in routing) for routing in rows)
    assert sum(int(line["right"]) for line in bins) == right


def copy_of(folder, to, *changes):
    """A copy of a run folder, whose configuration names its own place and has some other text in it."""
    shutil.copytree(folder, to)
    config = (to / "config.yaml").read_text()
    for old, new in ((str(folder), str(to)), *changes):
        assert old in config, old
        config = config.replace(old, new)
    (to / "config.yaml").write_text(config)
    return to


def test_the_ranks_of_more_are_its_experts(world, tmp_path):  # noqa: F811
    config = reporting(world.config(method="MoRE"), **EVERY)
    config["trainer"]["callbacks"].append({"class_path": "RankReport"})
    world.fit(tmp_path / "run", config)
    ranks = {(line["task"], line["linear"]): f"r{line['rank']}" for line in table(tmp_path / "run/routing/ranks.csv")}
    used = [line for line in table(tmp_path / "run/routing/use.csv") if line["split"] == "test"]
    assert len(used) == 4 * len(ranks) and {line["tokens"] for line in used} == {"9"}
    for line in used:
        assert float(line["weight"]) == (line["expert"] == ranks[line["task"], line["layer"]])
    assert {line["dead"] for line in table(tmp_path / "run/routing/summary.csv")} == {"0"}
    assert {line["name"] for line in table(tmp_path / "run/routing/embedding.csv")} == {"tone", "next"}


def test_a_later_test_records_what_the_fit_did_not(faulty, tmp_path):
    folder = copy_of(faulty, tmp_path / "run")
    last = [part.replace("best.ckpt", "last.ckpt") for part in retest(folder)]
    before = files(folder / "routing")
    run(last)
    assert files(folder / "routing") == before
    (folder / "routing" / "use.csv").unlink()
    run(last)
    tested = {line["step"] for line in table(folder / "routing" / "use.csv")}
    assert tested == {str(step_of(folder / "checkpoints" / "last.ckpt"))} == {"12"}


def test_a_configured_report_takes_the_place_of_the_usual_one(world, tmp_path):  # noqa: F811
    made = world.fit(tmp_path / "run", reporting(world.config(), rows_per_task=2, every_n_steps=0))
    (report,) = [each for each in made.trainer.callbacks if isinstance(each, RoutingReport)]
    assert (report.rows_per_task, report.every_n_steps) == (2, 0)
    assert {line["split"] for line in table(tmp_path / "run/routing/summary.csv")} == {"validation", "test"}


@pytest.mark.parametrize("name", ["rows_per_task", "every_n_steps"])
def test_a_negative_number_is_refused(name):
    with pytest.raises(ValueError, match=f"RoutingReport: {name} is -1; give a number, or 0"):
        RoutingReport(**{name: -1})


def test_what_is_no_run_is_refused(faulty, tmp_path):
    with pytest.raises(ValueError, match="run: .*config.yaml' is no file; name the folder of a run"):
        record_run(tmp_path)
    copy_of(faulty, tmp_path / "run", ("/tasks/tone", "/tasks/mood"))
    with pytest.raises(ValueError, match="its configuration has tasks .*mood.*, its checkpoint .*tone"):
        record_run(tmp_path / "run")


# ---- two processes --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_report_what_one_does(world, tmp_path, strategy):  # noqa: F811
    config = reporting(world.config(tasks=("tone", "next", "mood")), **EVERY)
    config["model"]["init_args"]["dropout"] = 0.0
    config["trainer"]["max_epochs"] = 1
    config["trainer"]["callbacks"][1:2] = []  # two recorders would write one file
    config["model"]["init_args"]["optimizer"] = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.01}}
    file = world.write(tmp_path / "config.yaml", config)
    world.fit(tmp_path / "one", config)
    two = start(file, tmp_path / "two", "--trainer.devices=2", f"--trainer.strategy={strategy}")
    finish(two, tmp_path / "two")
    for name, keys in (("summary.csv", 3), ("use.csv", 5), ("clusters.csv", 3), ("embedding.csv", 2)):
        one, both = (split_lines(tmp_path / run / "routing" / name, keys) for run in ("one", "two"))
        assert both[0] == one[0], name
        assert both[1] == pytest.approx(one[1], abs=2e-2 if name == "use.csv" else 1e-3), name  # a tie may turn


def split_lines(file, keys):
    """The first columns of a CSV file, and all its other numbers in a row."""
    lines = [list(line.values()) for line in table(file)]
    return [line[:keys] for line in lines], [float(value) for line in lines for value in line[keys:]]
