"""The null expert in use: calibrated by a fit's validations, applied by tests and predictions, rated on other tasks."""

import csv
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from lightning.pytorch import Callback

from moe_peft.callbacks.null_expert import NullExpert
from moe_peft.cli import run
from moe_peft.methods import evaluation
from moe_peft.methods.refusal import NO_LIMIT
from moe_peft.runs import load_module
from tests.tiny_fits import lora, predicted, retest
from tests.tiny_runs import one_error, results, world  # noqa: F401  (a fixture)

KEEP = 0.7
"""Of the ten validation rows of two tasks: seven stay."""


class Seen(Callback):
    """Keeps the threshold at every batch of a validation."""

    thresholds: ClassVar[list[float]] = []

    def on_validation_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.thresholds.append(pl_module.null_below.item())


def configured(world, kind, outside=(), epochs=3, **null):  # noqa: F811
    """Two tasks; experts for one epoch, the router for the others."""
    config = world.config(("tone", "mood"), kind, "TTLoRAMoE")
    config["model"]["init_args"]["lr"] = {"routers": 0.05}
    stages = config["trainer"]["callbacks"][0]
    seen = {"class_path": "tests.callbacks.test_null_expert.Seen"}
    config["trainer"] |= {"callbacks": [stages, {"class_path": "NullExpert", "init_args": null}, seen]}
    config["trainer"]["max_epochs"] = epochs
    config["data"]["init_args"]["outside"] = [str(world.tasks[name]) for name in outside]
    return config


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def confidences(rows: list[dict[str, Any]]) -> list[float]:
    return [row["routing"]["confidence"] for row in rows]


@pytest.fixture(scope="module", params=["causal", "classifier"])
def whole(request, world, tmp_path_factory):  # noqa: F811
    """The run folder of a fit with its test, on tasks of all kinds as outside."""
    folder = tmp_path_factory.mktemp(f"null-{request.param}") / "run"
    Seen.thresholds.clear()
    world.fit(folder, configured(world, request.param, ("next", "count", "stars"), keep=KEEP))
    return folder


def test_a_fit_leaves_the_threshold_at_which_the_share_of_its_validation_rows_stays(whole):
    module = load_module(whole / "checkpoints" / "best.ckpt")
    run(["predict", *retest(whole)[1:], "--data.init_args.predict_split=validation"])
    sure = sorted(confidences(lines(whole / "predictions.best.jsonl")))
    (whole / "predictions.best.jsonl").unlink()
    assert len(sure) == 10 and sure[2] < sure[3]
    assert module.null_below.item() == sure[3]


def test_the_last_checkpoint_has_a_threshold_too(whole):
    state = torch.load(whole / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert state["router_trained"] and state["null_below"] > NO_LIMIT


def test_validations_of_a_fit_refuse_no_row(whole):
    assert len(Seen.thresholds) >= 6 and set(Seen.thresholds) == {NO_LIMIT}


def test_a_tests_files_say_which_rows_were_refused(whole):
    limit, rows = load_module(whole / "checkpoints" / "best.ckpt").null_below.item(), lines(whole / "predictions.jsonl")
    refused = [value < limit for value in confidences(rows)]
    assert [row["routing"].get("as_task/none") == 1.0 for row in rows] == refused
    assert 0 < sum(refused) < len(rows) == 18
    notes = results(whole / "results.json")["notes"]
    for task in ("tone", "mood"):
        share = [no for row, no in zip(rows, refused, strict=True) if row["task_name"] == task]
        assert (f"and refused {sum(share) / len(share):.1%}" in notes[task]) == any(share)


def test_predict_says_how_sure_the_router_was(whole):
    found = {row["row_id"]: row["routing"] for row in predicted(whole)}
    assert found == {row["row_id"]: row["routing"] for row in lines(whole / "predictions.jsonl")}


def test_the_report_rates_confidence_on_tasks_of_any_kind_from_elsewhere(whole, capsys):
    module, data = load_module(whole / "checkpoints" / "best.ckpt"), run(retest(whole)).datamodule
    inside, limit = confidences(lines(whole / "predictions.test-best.jsonl")), module.null_below.item()
    with (whole / "routing" / "outside.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [(line["inputs"], line["task"]) for line in table] == [
        ("mixture", "all"), ("outside", "next"), ("outside", "count"), ("outside", "stars"), ("outside", "all")
    ]  # fmt: skip
    others: list[float] = []
    for line in table[1:]:
        if line["task"] != "all":
            with torch.no_grad():
                batches = data.prompts(data.outside_rows[line["task"]])
                own = torch.cat([module.router.confidence(module.scores(batch)) for batch in batches]).tolist()
            others += own
        else:
            own = others
        pairs = [1.0 if a > b else 0.5 if a == b else 0.0 for a in inside for b in own]
        assert int(line["rows"]) == len(own)
        assert float(line["refused"]) == pytest.approx(sum(value < limit for value in own) / len(own))
        assert float(line["auroc"]) == pytest.approx(math.fsum(pairs) / len(pairs), abs=1e-6)
    assert float(table[0]["refused"]) == pytest.approx(sum(value < limit for value in inside) / 18)
    assert len(others) == 27 and table[0]["auroc"] == ""


def test_the_oracle_asks_no_router_and_writes_no_report(whole, tmp_path):
    run([*retest(whole), "--model.init_args.routing=oracle", f"--trainer.default_root_dir={tmp_path}"])
    assert not (tmp_path / "routing").exists()


@pytest.mark.parametrize("whole", ["classifier"], indirect=True)
def test_a_router_that_learned_on_has_no_threshold_until_the_next_validation(whole, tmp_path):
    last = whole / "checkpoints" / "last.ckpt"
    before = torch.load(last, weights_only=True)
    where = [f"--config={whole}/config.yaml", f"--ckpt_path={last}", f"--trainer.default_root_dir={tmp_path}/run"]
    run(["fit", *where, "--trainer.max_epochs=4", "--trainer.limit_val_batches=0"])
    resumed = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    assert resumed["global_step"] > before["global_step"]
    assert before["state_dict"]["null_below"] > NO_LIMIT and resumed["state_dict"]["null_below"] == NO_LIMIT


def test_the_rows_of_all_ranks_decide(world, tmp_path, monkeypatch):  # noqa: F811
    """Another rank, as `gather` would bring it, has as many rows, in all of which its router was less sure."""
    own, surest = evaluation.gather, []

    def gather(rows):
        asked = [row for row in rows if row.routing and "confidence" in row.routing]
        if len(asked) != 10:  # before there is a router, and in the test
            return own(rows)
        surest[:] = sorted(row.routing["confidence"] for row in asked)
        less = [{"confidence": row.routing["confidence"] - 100} for row in asked]
        pairs = zip(asked, less, strict=True)
        return own(rows + [replace(row, row_id=f"{row.row_id}, too", routing=routing) for row, routing in pairs])

    monkeypatch.setattr(evaluation, "gather", gather)
    world.fit(tmp_path / "run", configured(world, "classifier", epochs=2, keep=0.5))
    last = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    assert last["null_below"] == surest[0]


@pytest.mark.parametrize("keep", [0, -0.5, 1.01, math.nan])
def test_a_share_that_is_none_is_refused(keep):
    with pytest.raises(ValueError, match=rf"^NullExpert: keep is {keep}, give a share above 0 and up to 1, for ex"):
        NullExpert(keep)


def test_a_method_without_a_router_for_inputs_is_refused(world, tmp_path, capsys):  # noqa: F811
    config = lora(world.config())
    config["trainer"]["callbacks"] = [{"class_path": "NullExpert"}]
    file = world.write(tmp_path / "wrong.yaml", config)
    line = one_error(capsys, "fit", f"--config={file}", f"--trainer.default_root_dir={tmp_path}/run")
    assert line == "error: NullExpert: LoRA routes no whole inputs; drop this callback"
