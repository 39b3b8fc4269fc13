"""Which fits are run, and which learning rate is chosen; the fits are pretended."""

import json
import re
from functools import partial

import pytest

from moe_peft.rack.command import plan, run_missing
from moe_peft.rack.preparing import prepare
from tests.rack.tiny_rack import pretend, rack
from tests.tiny_runs import world

__all__ = ["pretend", "rack", "world"]
RATES = [0.001, 0.01, 0.1]


def alike(tag, seed, rate):
    """The same score for all."""
    return 0.5, 0.5


def finish(file, more=()):
    """Runs what is missing; returns the lines that were said."""
    said = []
    run_missing(prepare(file, more), -1, said.append)
    return said


def test_the_rate_is_chosen_by_validation_where_the_test_would_choose_another(rack, pretend):
    validation, test = {0.001: 0.6, 0.01: 0.7, 0.1: 0.5}, {0.001: 0.9, 0.01: 0.2, 0.1: 0.8}
    fits = pretend(lambda tag, seed, rate: (validation[rate], test[rate]))
    said = finish(rack.write(["lora"], seeds=[0, 1, 2], learning_rates=RATES))
    assert fits.done == [("lora", 0, rate) for rate in RATES] + [("lora", 1, 0.01), ("lora", 2, 0.01)]
    assert len(said) == 5 and said[1].startswith("[1/1] lora, seed 0, learning rate 0.01: validation 70.0")


def test_every_method_has_a_rate_of_its_own(rack, pretend):
    best = {"lora": 0.1, "trex": 0.001}
    fits = pretend(lambda tag, seed, rate: (0.5 + 0.1 * (rate == best[tag]), 0.5))
    finish(rack.write(seeds=[4, 5], learning_rates=RATES))
    assert [place for place in fits.done if place[1] == 5] == [("lora", 5, 0.1), ("trex", 5, 0.001)]


def test_a_rate_that_diverges_is_out_and_not_tried_again(rack, pretend):
    fits = pretend(lambda tag, seed, rate: None if rate == 0.1 else (0.5, 0.5))
    file = rack.write(["lora"], seeds=[0, 1], learning_rates=RATES)
    said = finish(file)
    assert "diverged: the loss is not finite at step 3" in said[2]
    assert fits.done[-1] == ("lora", 1, 0.001)
    assert finish(file) == [] and len(fits.done) == 4


def test_a_fit_that_fails_otherwise_stops_it_all(rack, monkeypatch):
    from moe_peft.rack import fits

    def full(command, log, lock):
        log.write_text("fine so far\nerror: cannot write x (No space left on device)\n")
        return 2

    monkeypatch.setattr(fits, "supervised", full)
    with pytest.raises(ValueError, match=r"lora, seed 0: the fit ended with status 2: cannot write x \(No space"):
        finish(rack.write())


def test_nothing_finished_is_run_again_and_a_change_reruns_what_it_changes(rack, pretend):
    fits = pretend(alike)
    write = partial(rack.write, seeds=[0, 1])
    finish(write())
    assert len(fits.done) == 4
    finish(write())
    assert len(fits.done) == 4
    finish(write(["lora", {"method": "trex", "model": {"init_args": {"r2": 3}}}]))
    assert fits.done[4:] == [("trex", 0, None), ("trex", 1, None)]
    finish(write(["lora", "trex", "mola"]))
    assert fits.done[6:] == [("mola", 0, None), ("mola", 1, None)]


def test_other_rows_in_a_task_folder_rerun_everything_and_a_moved_one_nothing(rack, pretend, world):
    fits = pretend(alike)
    folders = [world.task(rack.root / "here" / name, name) for name in ("tone", "next")]
    data = {"data": {"class_path": "MultitaskDataModule", "init_args": {"tasks": ["tone", "next"]}}}
    world.write(rack.data, data)
    file, more = rack.write(["lora"]), [f"--data.root={folders[0].parent}"]
    finish(file, more)
    folders[0].parent.rename(rack.root / "there")
    more = [f"--data.root={rack.root / 'there'}"]
    finish(file, more)
    assert len(fits.done) == 1
    rows = rack.root / "there" / "next" / "train.jsonl"
    rows.write_text(rows.read_text().replace("after 1 comes", "after one comes"))
    finish(file, more)
    assert len(fits.done) == 2


def test_the_budget_is_that_of_a_method(rack, pretend):
    pretend(alike)
    contest = prepare(rack.write(["lora", "mola"], budget={"method": "trex", "model": {"init_args": {"r2": 4}}}))
    larger = prepare(rack.write(["lora", {"method": "mola", "sized": False}], budget=contest.budget + 1))
    assert all(row.parameters >= contest.budget for row in contest.rows)
    size = contest.rows[0].decided["model"]["init_args"]["rank"]
    one = prepare(rack.write([{"method": "lora", "model": {"init_args": {"rank": size - 1}}}])).rows[0].parameters
    assert one < contest.budget <= contest.rows[0].parameters
    assert not larger.rows[1].decided


def test_the_plan_names_what_is_to_be_run_and_runs_nothing(rack, pretend):
    fits = pretend(alike)
    file = rack.write(["lora", "trex"], seeds=[0, 1, 2], learning_rates=RATES)
    lines = plan(prepare(file))
    assert lines[2] == "lora, seed 0, learning rate 0.001: to be run, no estimate before a first run"
    assert lines[-1] == "10 fits to run" and not fits.done and not rack.out.exists()
    finish(rack.write(["lora"], seeds=[0, 1, 2], learning_rates=RATES))
    lines = plan(prepare(rack.write(["lora", "trex"], seeds=[0, 1, 2], learning_rates=RATES)))
    assert lines[-1] == "5 fits to run, about 0 s"
    assert [line for line in lines if line.startswith("lora, ")] == []
    assert lines[-2] == "trex, 2 further seeds with the rate that is chosen: about 0 s each"


def test_the_plan_has_no_seeds_for_what_diverged_and_counts_what_leaves_a_task_out(rack, pretend):
    pretend(lambda tag, seed, rate: None if tag == "trex" else (0.5, 0.5))
    settings = {"seeds": [0, 1], "learning_rates": RATES, "leave_one_out": {"shots": 2}}
    finish(rack.write(["lora", "trex"], **settings))
    lines = plan(prepare(rack.write(["lora", "trex"], **settings)))
    assert lines[2:] == ["0 fits to run, about 0 s", "leave-one-out: 12 fits in all for 2 rows, after these"]


def test_a_row_with_another_tag_finds_its_fits(rack, pretend):
    fits = pretend(alike)
    finish(rack.write(["lora"]))
    finish(rack.write([{"method": "lora", "tag": "mine"}]))
    assert fits.done == [("lora", 0, None)]


@pytest.mark.parametrize(
    ("said", "diverged"),
    [
        ("row 'tone/3': scores=(nan, nan) have no best option; the model diverged: lower the learning rate, or", True),
        ("step 0: model.a got a gradient that is not finite; give the backbone a dtype of wider range", False),
        ("checkpoint: the values of q_proj are not finite; use one from before they came", False),
    ],
)
def test_only_what_a_lower_rate_mends_has_diverged(rack, monkeypatch, said, diverged):
    from moe_peft.rack import fits

    def end(command, log, lock):
        log.write_text(f"error: {said}\n")
        return 2

    monkeypatch.setattr(fits, "supervised", end)
    file = rack.write(["lora"], learning_rates=[0.1])
    if diverged:
        assert f"diverged: {said}" in finish(file)[0]
        return
    with pytest.raises(ValueError, match="the fit ended with status 2"):
        finish(file)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"methods": ["lora", "molla"]}, "methods: there is no 'molla'; give a YAML, or one of "),
        ({"methods": []}, "methods: the list is empty"),
        ({"methods": ["lora", "lora"]}, "methods: 'lora' is there twice; give a tag of its own"),
        ({"methods": [{"method": "lora", "rank": 3}]}, "methods: 'rank' means nothing; a method has method, tag, "),
        ({"methods": [{"tag": "x"}]}, "methods: "),
        ({"seeds": [1, 1]}, "seeds: 1 is there twice"),
        ({"learning_rates": []}, "learning_rates: the list is empty"),
        ({"common": {"modle": {}}}, "common: 'modle' is no section of a configuration; use model, data, "),
        (
            {"common": {"trainer": {"callbacks": []}}},
            "common: trainer.callbacks would take the methods' own away; write",
        ),
        ({"reference": "trex"}, "reference: there is no row 'trex'; use one of lora"),
        ({"base": "nowhere"}, "base: there is no 'nowhere'; give a YAML, or one of "),
        (
            {"methods": ["mola"], "budget": 100},
            "methods: mola: parameters: 100 is below the smallest form of MoLA, 2,816 (rank 1)",
        ),
        (
            {"methods": [{"method": "lora", "model": {"init_args": {"rnak": 3}}}]},
            "methods: lora: model: LoRA has no argument 'rnak'; it has ",
        ),
        ({"methods": [{"method": "lora", "sized": "no"}]}, "methods: sized: 'no' is neither true nor false"),
        (
            {"methods": [{"method": "lora", "tag": tag} for tag in ("a b", "a-b")]},
            "methods: 'a-b' is there twice; give a tag whose folder has another name",
        ),
        (
            {"methods": [{"method": "lora", "checkpoint": {"monitor": "val/loss"}}], "learning_rates": [0.1]},
            "methods: lora: checkpoint.monitor: 'val/loss' (max) does not tell which learning rate is the best; use",
        ),
        (
            {"methods": ["lora", {"method": "trex", "trainer": {"limit_test_batches": 1}}]},
            "methods: trex takes other rows of the tasks than lora; leave tasks' own arguments and ",
        ),
        (
            {"methods": ["lora", {"method": "trex", "model": {"init_args": {"ranking": "per_char"}}}]},
            "methods: trex ranks options by 'per_char', lora by 'sum'; give all rows one model.init_args.ranking",
        ),
        (
            {"common": {"data": {"init_args": {"sampling": {"class_path": "EqualRows"}, "batch_size": 7}}}},
            "methods: lora: batch_size=7 cannot hold equally many rows of 2 tasks; use 6 or 8.",
        ),
        (
            {"common": {"trainer": {"precision": "16-true"}}},
            "methods: lora: trainer.precision: '16-true' would store the adapters in half precision",
        ),
        (
            {"leave_one_out": {"overlay": {"trainer": {"max_stepz": 5}}}},
            "leave_one_out: lora: Group 'trainer' does not accept option 'max_stepz'",
        ),
        (
            {"leave_one_out": {"tasks": ["mood"]}},
            "leave_one_out.tasks: 'mood' cannot be left out of tone, next; name one of several",
        ),
        ({"seed": 3}, "comparison: 'seed' means nothing; a comparison has base, data, methods, out, "),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_run(rack, run_tool, changes, expected):
    status, out, errors = run_tool("compare", rack.write(**{"methods": ["lora"]} | changes))
    assert (status, out, len(errors)) == (2, [], 1), errors
    assert errors[0].startswith(f"error: {expected}"), errors
    assert not rack.out.exists()


@pytest.mark.parametrize(
    "given", [["--ckpt_path=x.ckpt"], ["--seed_everything", "3"], ["--trainer.default_root_dir=x"], ["--config", "x"]]
)
def test_what_a_comparison_gives_to_its_fits_cannot_be_given(rack, run_tool, given):
    status, out, errors = run_tool("compare", rack.write(["lora"]), *given)
    name = given[0].partition("=")[0]
    assert (status, out) == (2, []) and not rack.out.exists()
    assert errors == [f"error: {name}: a comparison gives every fit its own; leave it out, or change the YAML"]


def test_rows_on_other_bases_are_refused(rack, world):
    init = {"backbone": {"class_path": "Seq2SeqLM", "init_args": {"name": str(world.backbones["seq2seq"])}}}
    names = [re.escape(str(world.backbones[kind])) for kind in ("seq2seq", "causal")]
    with pytest.raises(ValueError, match="methods: trex is on {}, lora on {}; compare on one base".format(*names)):
        prepare(rack.write(["lora", {"method": "trex", "model": {"init_args": init}}]))
    other = {"backbone": {"init_args": {"dtype": "bfloat16"}}}
    with pytest.raises(
        ValueError, match="methods: trex is on .*, lora on .* with other arguments; compare on one base"
    ):
        prepare(rack.write(["lora", {"method": "trex", "model": {"init_args": other}}]))


def test_the_reference_is_lora_or_else_the_first_row(rack):
    assert prepare(rack.write(["trex", "lora"])).comparison.reference == "lora"
    assert prepare(rack.write(["trex", "mola"])).comparison.reference == "trex"


def test_a_fit_without_validation_ends_it_where_a_rate_is_to_be_chosen(rack, pretend):
    pretend(lambda tag, seed, rate: (float("nan"), 0.5))
    with pytest.raises(ValueError, match=r"lora, seed 0, learning rate 0.001: there was no validation to choose a lea"):
        finish(rack.write(["lora"], learning_rates=RATES))
    with pytest.raises(ValueError, match="there was no validation"):  # finished as it is
        finish(rack.write(["lora"], learning_rates=RATES))
    assert finish(rack.write(["lora"])) == ["[1/1] lora, seed 0: done (0 s)"]


def test_runs_of_other_tasks_are_refused(rack, pretend, run_tool, world):
    pretend(alike)
    finish(rack.write(["lora"]))
    content = {"data": {"class_path": "MultitaskDataModule", "init_args": {"tasks": [str(world.tasks["mood"])]}}}
    world.write(rack.data, content)
    status, _, errors = run_tool("compare", rack.write(["lora"]))
    assert status == 2 and "is a finished run of tone, next, this comparison is of mood; name another" in errors[0]


def test_rows_of_other_tasks_are_refused(rack, world):
    mood = {"method": "trex", "data": {"init_args": {"tasks": [str(world.tasks["mood"])]}}}
    with pytest.raises(
        ValueError, match="methods: trex is of the tasks mood, lora of tone, next; compare over the same"
    ):
        prepare(rack.write(["lora", mood]))


def test_a_run_says_what_it_is(rack, pretend):
    pretend(alike)
    finish(rack.write(["lora"], learning_rates=[0.003]))
    (file,) = rack.out.glob("runs/lora/*/rack.json")
    about = json.loads(file.read_text())
    assert file.parent.name == f"seed0-lr0.003-{about['hash'][:8]}"
    assert about["learning_rate"] == 0.003 and about["tasks"] == ["tone", "next"]
    assert about["commits"] and about["finished"] and about["command"][1:4] == ["-m", "moe_peft", "fit"]
