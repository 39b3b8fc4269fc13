"""RankReport: the task x linear rank table as files of a run, equal to what the saved weights say."""

import csv
import shutil

import pytest
import torch

from moe_peft.callbacks.rank_report import RankReport
from moe_peft.cli import run
from moe_peft.methods.lora import LoRA
from moe_peft.runs import load_module
from tests.tiny import build
from tests.tiny_runs import metrics, world

__all__ = ["world"]


def read(file):
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))


@pytest.fixture(scope="module")
def folder(world, tmp_path_factory):
    """A fit of two epochs of MoRE with quick selectors."""
    folder = tmp_path_factory.mktemp("ranks") / "run"
    config = world.config()
    arguments = {key: config["model"]["init_args"][key] for key in ("backbone", "optimizer", "max_new_tokens")}
    config["model"] = {"class_path": "MoRE", "init_args": arguments | {"rank": 4, "lr": {"routers": 0.1}}}
    config["trainer"]["callbacks"] = [{"class_path": "TaskContrast"}, {"class_path": "RankReport"}]
    world.fit(folder, config)
    return folder


def test_the_final_table_is_that_of_the_tested_weights(folder):
    module = load_module(folder / "checkpoints" / "best.ckpt")
    rows = read(folder / "routing" / "ranks.csv")
    assert len(rows) == len(module.specs) * len(module.adapted)
    now, start = module.rank_table(), module.rank_table(start=True)
    tasks = [spec.name for spec in module.specs]
    for row in rows:
        at = tasks.index(row["task"])
        assert (int(row["start"]), int(row["rank"])) == (start[row["linear"]][at], now[row["linear"]][at])
    assert any(row["start"] != row["rank"] for row in rows)


def test_the_history_has_the_table_of_every_validation(folder):
    rows = read(folder / "routing" / "rank_history.csv")
    steps = sorted({int(row["step"]) for row in rows})
    assert len(steps) == 2
    module = load_module(folder / "checkpoints" / "last.ckpt")
    table = module.rank_table()
    for row in rows[-len(rows) // 2 :]:
        assert int(row["rank"]) == table[row["linear"]][[spec.name for spec in module.specs].index(row["task"])]


def test_a_resumed_fit_writes_no_step_twice(folder, world, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(folder, copy)
    steps = {int(row["step"]) for row in read(copy / "routing" / "rank_history.csv")}
    checkpoint = torch.load(copy / "checkpoints" / "best.ckpt", weights_only=True)
    run(
        ["fit", f"--config={copy}/config.yaml", f"--ckpt_path={copy}/checkpoints/best.ckpt"]
        + [f"--trainer.default_root_dir={copy}", "--trainer.max_epochs=3"]
    )
    rows = read(copy / "routing" / "rank_history.csv")
    assert len({(row["step"], row["task"], row["linear"]) for row in rows}) == len(rows)
    assert checkpoint["global_step"] in steps and len({row["step"] for row in rows}) == 3


def test_the_picture_is_a_picture(folder):
    assert (folder / "routing" / "ranks.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_ranks_entropy_and_distinct_ranks_are_logged(folder):
    module = load_module(folder / "checkpoints" / "last.ckpt")
    for name, value in module.diagnostics().items():
        assert float(metrics(folder, name)[-1][1]) == pytest.approx(value, rel=1e-5), name


def test_another_method_is_refused():
    with pytest.raises(ValueError, match="LoRA has no ranks to choose; remove the callback"):
        RankReport().setup(None, build(LoRA), "fit")


def test_a_later_test_leaves_the_files_alone(folder):
    before = {file: file.read_bytes() for file in (folder / "routing").iterdir()}
    run(["test", f"--config={folder}/config.yaml", f"--ckpt_path={folder}/checkpoints/last.ckpt"])
    assert {file: file.read_bytes() for file in (folder / "routing").iterdir()} == before
