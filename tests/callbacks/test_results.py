"""Results: files, cache, table and errors, on a real Trainer with a module that answers at random."""

import errno
import io
import json
import math
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from rich.console import Console
from torch.utils.data import DataLoader

from moe_peft.callbacks import base_cache
from moe_peft.callbacks.results import Results
from moe_peft.data.tasks import TaskSpec
from moe_peft.predictions import Prediction
from moe_peft.report import Facts, Report

SPECS = [
    TaskSpec("easy", "classification", "accuracy", "{text}", ("no", "yes")),
    TaskSpec("hard", "classification", "matthews", "{text}", ("no", "yes")),
]
N = 8


def answers(right):
    """N rows per task; the first `right` of each are right."""
    rows = []
    for task, spec in enumerate(SPECS):
        for index in range(N):
            label = index % 2
            good, bad = (0.0, -1.0) if (index < right) == (label == 0) else (-1.0, 0.0)
            rows.append(Prediction(f"{spec.name}/{index}", task, label, None, None, (good, bad), (2, 3), None, None))
    return rows


class FakeBackbone:
    kind, dtype = "causal", torch.float32

    def describe(self):
        return json.dumps({"class": "CausalLM", "name": "tiny"})


class Data(LightningDataModule):
    notes = {"hard": "cut from dev"}
    key = "rows-1"

    def majority(self, name):
        return 1

    def cache_key(self, split):
        assert split == "test"
        return self.key

    def loader(self):
        return DataLoader(torch.ones(2, 1))

    train_dataloader = test_dataloader = loader


class TREX(LightningModule):
    """Follows the contract of the Results callback."""

    def __init__(self, heads=False, fingerprint="base-1"):
        super().__init__()
        self.linear = torch.nn.Linear(1, 1)
        self.specs, self.backbone, self.ranking = SPECS, FakeBackbone(), "sum"
        self.max_new_tokens, self.fingerprint, self.base_available = 8, fingerprint, not heads
        self.score_base, self.asked, self.predictions = False, [], {}

    def routing_notes(self):
        return {}

    routes = True

    def trainable_parameters(self):
        return 2

    def training_step(self, batch, batch_idx):
        return self.linear(batch).mean()

    def test_step(self, batch, batch_idx):
        return None

    def on_test_epoch_end(self):
        self.asked.append(self.score_base)
        self.predictions = {"model": answers(7)} | ({"base": answers(5)} if self.score_base else {})

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def trainer(folder, callback=None, **options):
    callback = callback or Results(cache_dir=str(folder / "cache"))
    return Trainer(
        accelerator="cpu",
        default_root_dir=folder / "run",
        callbacks=[callback],
        logger=False,
        max_epochs=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def run_test(folder, module=None, data=None, callback=None, **options):
    module = module or TREX()
    trainer(folder, callback, **options).test(module, data or Data(), verbose=False)
    return module


def files(folder):
    return sorted(path.name for path in (folder / "run").iterdir() if path.is_file())


def load(folder, name="results.test-none.json"):
    return json.loads((folder / "run" / name).read_text())


def test_numbers_by_hand(tmp_path):
    run_test(tmp_path)
    results = load(tmp_path)
    rows = results["rows"]
    assert rows["model"]["tasks"]["easy"] == {
        "metric": "accuracy",
        "value": 7 / 8,
        "stderr": math.sqrt(7 / 8 / 8 / 8),
        "n": 8,
    }
    assert rows["base"]["tasks"]["easy"]["value"] == 5 / 8
    assert rows["majority"]["tasks"]["easy"]["value"] == 1 / 2
    assert rows["majority"]["tasks"]["hard"]["value"] == 0
    assert rows["model"]["mean"] == pytest.approx((7 / 8 + rows["model"]["tasks"]["hard"]["value"]) / 2)
    assert results["paired"]["model-base"]["difference"] == pytest.approx(rows["model"]["mean"] - rows["base"]["mean"])
    assert results["paired"]["model-majority"]["difference"] == pytest.approx(
        rows["model"]["mean"] - rows["majority"]["mean"]
    )
    assert results["secondary"]["ranking"] == "per_char"
    assert results["secondary"]["rows"]["model"]["mean"] == rows["model"]["mean"]


def test_format_is_the_documented_one(tmp_path, monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    run_test(tmp_path)
    results = load(tmp_path)
    assert list(results)[:4] == ["method", "backbone", "seed", "trainable_parameters"]
    assert (results["method"], results["seed"], results["trainable_parameters"]) == ("TREX", 7, 2)
    assert results["backbone"] == {"class": "CausalLM", "name": "tiny"}
    assert {"moe_peft", "python", "torch", "lightning", "transformers"} == set(results["versions"])
    assert results["wall_seconds"] is None and results["notes"] == {"hard": "cut from dev"}
    assert list(results["rows"]) == ["base", "majority", "model"]


def test_fit_then_test_writes_results_and_a_later_test_leaves_them(tmp_path):
    run, module = trainer(tmp_path), TREX()
    run.fit(module, Data())
    run.test(module, Data(), verbose=False)
    assert files(tmp_path) == ["results.json", "results.md"]
    assert load(tmp_path, "results.json")["wall_seconds"] > 0
    before = (tmp_path / "run" / "results.json").read_bytes()
    run.save_checkpoint(tmp_path / "step=3.ckpt")
    for _ in range(2):
        trainer(tmp_path).test(TREX(), Data(), ckpt_path=tmp_path / "step=3.ckpt", verbose=False, weights_only=False)
    run_test(tmp_path)
    assert (tmp_path / "run" / "results.json").read_bytes() == before
    names = [f"results{stem}.{end}" for stem in ("", ".test-none", ".test-step=3") for end in ("json", "md")]
    assert files(tmp_path) == sorted(names)
    assert load(tmp_path, "results.test-step=3.json")["checkpoint"] == str(tmp_path / "step=3.ckpt")


def test_a_resumed_fit_goes_on_counting_seconds():
    callback = Results()
    callback.load_state_dict({"fit_seconds": 100.0})
    callback.on_fit_start(None, None)
    assert callback.state_dict()["fit_seconds"] >= 100.0


def test_base_is_scored_once_and_then_cached(tmp_path):
    assert run_test(tmp_path).asked == [True]
    first = load(tmp_path)
    assert run_test(tmp_path).asked == [False]
    assert load(tmp_path)["rows"] == first["rows"] and first["rows"]["base"] != "n/a"


@pytest.mark.parametrize("change", ["fingerprint", "rows", "dtype", "max_new_tokens", "precision"])
def test_another_base_rows_or_protocol_is_scored_anew(tmp_path, change):
    run_test(tmp_path)
    module, data, options = TREX(), Data(), {}
    match change:
        case "fingerprint":
            module.fingerprint = "base-2"
        case "rows":
            data.key = "rows-2"
        case "dtype":
            module.backbone.dtype = torch.bfloat16
        case "max_new_tokens":
            module.max_new_tokens = 9
        case _:
            options = {"precision": "bf16-mixed"}
    assert run_test(tmp_path, module, data, **options).asked == [True]


@pytest.mark.parametrize("damage", [b"", b"{", b"\xff\xfe", b'{"rows": 16}\n{}\n', "truncate"])
def test_a_damaged_cache_is_scored_anew_and_repaired(tmp_path, damage):
    run_test(tmp_path)
    (file,) = (tmp_path / "cache").iterdir()
    good = file.read_bytes()
    file.write_bytes(b"".join(good.splitlines(keepends=True)[:-1]) if damage == "truncate" else damage)
    assert run_test(tmp_path).asked == [True]
    assert [path.read_bytes() for path in (tmp_path / "cache").iterdir()] == [good]


def test_a_cache_about_other_gold_answers_is_dropped(tmp_path):
    run_test(tmp_path)
    (file,) = (tmp_path / "cache").iterdir()
    file.write_text(file.read_text().replace('"label": 1', '"label": 0'))
    with pytest.warns(UserWarning, match="was about other rows and is deleted"):
        run_test(tmp_path)
    assert load(tmp_path)["rows"]["base"] == "n/a" and not file.exists()


def test_line_separators_in_text_survive_the_cache(tmp_path):
    row = Prediction("easy/0", 0, 0, "a\u2028b\x85c", None, (0.0,), (1,), None, None)
    base_cache.write(tmp_path / "rows", [row])
    assert base_cache.read(tmp_path / "rows") == [row]


def test_part_of_the_rows_is_not_cached(tmp_path):
    run_test(tmp_path, limit_test_batches=1)
    assert not (tmp_path / "cache").exists()
    assert load(tmp_path)["rows"]["base"] != "n/a"


def test_an_unwritable_cache_only_warns(tmp_path):
    (tmp_path / "cache").write_text("")
    with pytest.warns(UserWarning, match="the base's answers are not kept"):
        run_test(tmp_path)
    assert load(tmp_path)["rows"]["base"] != "n/a"


@pytest.mark.parametrize("module, base_row", [(TREX(heads=True), True), (TREX(), False)])
def test_no_base_is_not_available(tmp_path, module, base_row):
    run_test(tmp_path, module, callback=Results(str(tmp_path / "cache"), base_row=base_row))
    results = load(tmp_path)
    assert module.asked == [False]
    assert results["rows"]["base"] == "n/a" == results["paired"]["model-base"]
    assert results["paired"]["model-majority"]["difference"] > 0


def test_fast_dev_run_writes_nothing(tmp_path):
    run_test(tmp_path, fast_dev_run=True)
    assert list(tmp_path.iterdir()) == []


def test_predictions_on_request(tmp_path):
    run_test(tmp_path, callback=Results(str(tmp_path / "cache"), save_predictions=True))
    lines = (tmp_path / "run" / "predictions.test-none.jsonl").read_text().splitlines()
    assert [Prediction.from_json(line) for line in lines] == answers(7)
    assert json.loads(lines[-1])["task_name"] == "hard"


def test_an_unwritable_run_folder_stops_before_any_work(tmp_path):
    (tmp_path / "run").write_text("")
    module = TREX()
    module.configure_model = lambda: pytest.fail("the model was built first")
    with pytest.raises(
        ValueError, match=r"default_root_dir='.*run' cannot be written \(.*\); .*--trainer.default_root"
    ):
        trainer(tmp_path).fit(module, Data())


def test_a_full_disk_is_one_line_naming_the_file_and_leaves_nothing_half_written(tmp_path, monkeypatch):
    real = Path.write_text

    def full(self, text, **options):
        if "results" not in self.name:
            return real(self, text, **options)
        real(self, text[:10], **options)
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "results.test-none.json").write_text("of an earlier test")
    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(
        OSError, match=r"cannot write .*results.test-none.json \(No space left on device\): free"
    ) as got:
        run_test(tmp_path)
    assert "\n" not in str(got.value) and files(tmp_path) == ["results.test-none.json"]
    assert (tmp_path / "run" / "results.test-none.json").read_text() == "of an earlier test"


def facts(**changes):
    fields = {
        "method": "TREX",
        "backbone": {"name": "tiny"},
        "seed": 0,
        "trainable_parameters": 1234,
        "wall_seconds": 61.4,
        "checkpoint": None,
        "validation": None,
        "versions": {"torch": "2"},
        "ranking": "sum",
        "notes": {"easy": "cut from dev", "hard": "cut from dev"},
    }
    return Facts(**fields | changes)


def shown(report, **options):
    screen = io.StringIO()
    report.print(Console(file=screen, **options))
    return screen.getvalue()


def test_plain_table_has_rows_tasks_notes_and_the_gain():
    report = Report(facts(), SPECS, {"base": answers(5), "majority": None, "model": answers(7)})
    text = shown(report)
    assert text.isascii() or set(c for c in text if not c.isascii()) == {"±"}
    cells = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("|")}
    assert "87.5 ±11.7" in cells["TREX"] and "62.5 ±17.1" in cells["base"] and "n/a" in cells["majority"]
    gain = report.gains["base"]
    line = f"TREX over base: {100 * gain.difference:+.1f} points"
    assert f"{line} (2 standard errors of the paired difference: {200 * gain.stderr:.1f})" in text
    assert "cut from dev: easy, hard." in text


def test_second_metrics_stand_below_the_table_and_in_the_file():
    specs = [TaskSpec("easy", "classification", "accuracy/f1", "{text}", ("no", "yes")), SPECS[1]]
    report = Report(facts(), specs, {"base": answers(5), "majority": None, "model": answers(8)})
    # base: rows 1 and 3 of the four yes rows and row 6 of the four no rows are taken for yes
    assert f"easy f1: base {100 * 4 / 7:.1f}, TREX 100.0." in shown(report)
    tasks = report.to_dict()["rows"]["base"]["tasks"]
    assert tasks["easy"]["beside"] == {"f1": pytest.approx(4 / 7)} and "beside" not in tasks["hard"]
    assert report.rows["base"].mean == (5 / 8 + tasks["hard"]["value"]) / 2


def test_the_gain_is_over_the_better_row():
    worse, better = answers(4), answers(6)
    report = Report(facts(), SPECS, {"base": worse, "majority": better, "model": answers(7)})
    assert report.gain_line().startswith("TREX over majority (the better of base and majority): ")


def test_many_tasks_are_split_into_tables_that_fit_the_screen():
    specs = [TaskSpec(f"task_{i}", "classification", "accuracy", "{text}", ("no", "yes")) for i in range(9)]
    rows = [Prediction(f"task_{i}/0", i, 0, None, None, (1.0, 0.0), (), None, None) for i in range(9)]
    text = shown(Report(facts(), specs, {"base": None, "majority": None, "model": rows}), width=80, force_terminal=True)
    assert "…" not in text and all(f"task_{i}" in text for i in range(9))
    assert max(len(line) for line in text.splitlines() if "±" in line) <= 80


def test_a_row_that_misses_a_task_has_no_mean_and_no_gain():
    report = Report(facts(), SPECS, {"base": None, "majority": answers(4)[:N], "model": answers(7)})
    results = report.to_dict()
    assert results["rows"]["majority"]["mean"] == "n/a" == results["paired"]["model-majority"]
    assert set(results["rows"]["majority"]["tasks"]) == {"easy"}
    assert report.gain_line() == "No row to compare with: neither base nor majority covers all tasks."


def test_markdown_table_is_well_formed():
    text = Report(facts(), SPECS, {"base": None, "majority": answers(4), "model": answers(7)}).to_markdown()
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert [line.count("|") for line in rows] == [5] * 5
    assert rows[0] == "|  | easy accuracy n=8 | hard matthews n=8 | mean |"
    assert rows[2] == "| base | n/a | n/a | n/a |"
    assert "1,234 trainable parameters; seed 0; training took 61 s." in text
