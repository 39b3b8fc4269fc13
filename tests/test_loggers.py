"""MetricsCSV: long form, resume, fresh start, lone test, errors."""

import csv

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from moe_peft.loggers import MetricsCSV


class Killed(Exception):
    """Stands for a kill signal."""


class Tiny(LightningModule):
    """Logs its step while training; dies at the start of step `die_at`."""

    def __init__(self, die_at=-1, value=0.0):
        super().__init__()
        self.linear, self.die_at, self.value = torch.nn.Linear(1, 1), die_at, value

    def training_step(self, batch, batch_idx):
        if self.global_step == self.die_at:
            raise Killed
        self.log("train/step", float(self.global_step) + self.value)
        return self.linear(batch).mean()

    def validation_step(self, batch, batch_idx):
        self.log("val/step", float(self.global_step))

    def test_step(self, batch, batch_idx):
        self.log("test/one", 1.0)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def loader():
    return DataLoader(torch.ones(12, 1))


def trainer(folder, every=None):
    save = ModelCheckpoint(save_last=True, every_n_train_steps=every, save_top_k=-1)
    return Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=MetricsCSV(str(folder)),
        callbacks=[save],
        log_every_n_steps=1,
        val_check_interval=4,
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def table(folder):
    with open(folder / "metrics.csv", newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["step", "epoch", "name", "value"]
    return [(int(step), name, float(value)) for step, _, name, value in rows[1:]]


def fit_and_resume(folder, every, die_at):
    with pytest.raises(Killed):
        trainer(folder, every).fit(Tiny(die_at), loader(), loader())
    left = table(folder)
    trainer(folder, every).fit(Tiny(), loader(), loader(), ckpt_path=folder / "checkpoints" / "last.ckpt")
    return left


def test_rows_are_long_form_with_step_and_epoch(tmp_path):
    MetricsCSV(str(tmp_path)).log_metrics({"epoch": 2, "a/b": 0.25, "c": float("nan")}, step=7)
    assert (tmp_path / "metrics.csv").read_text() == "step,epoch,name,value\n7,2,a/b,0.25\n7,2,c,nan\n"


def test_a_new_metric_only_appends(tmp_path):
    logger = MetricsCSV(str(tmp_path))
    logger.log_metrics({"a": 1.0}, step=0)
    before = (tmp_path / "metrics.csv").read_text()
    logger.log_metrics({"new": 2.0}, step=1)
    assert (tmp_path / "metrics.csv").read_text() == before + "1,,new,2.0\n"


def test_rows_are_on_disk_without_any_flush(tmp_path):
    with pytest.raises(Killed):
        trainer(tmp_path).fit(Tiny(die_at=3), loader(), loader())
    assert [row for row in table(tmp_path) if row[1] == "train/step"] == [(s, "train/step", float(s)) for s in range(3)]


@pytest.mark.parametrize("every, die_at", [(3, 5), (3, 8), (None, 7), (3, 6)])
def test_resume_leaves_the_file_of_an_uninterrupted_run(tmp_path, every, die_at):
    trainer(tmp_path / "whole", every).fit(Tiny(), loader(), loader())
    left = fit_and_resume(tmp_path / "cut", every, die_at)
    assert table(tmp_path / "cut") == table(tmp_path / "whole")
    assert len({(step, name) for step, name, _ in left}) == len(left) < len(table(tmp_path / "whole"))


def test_resume_drops_half_a_row_and_later_steps(tmp_path):
    with pytest.raises(Killed):
        trainer(tmp_path, 3).fit(Tiny(5), loader(), loader())
    with open(tmp_path / "metrics.csv", "a") as file:
        file.write("99,0,train/step,99.0\n3,,diagnostic,0.")
    trainer(tmp_path, 3).fit(Tiny(), loader(), loader(), ckpt_path=tmp_path / "checkpoints" / "last.ckpt")
    assert "diagnostic" not in {name for _, name, _ in table(tmp_path)}
    assert [step for step, name, _ in table(tmp_path) if name == "train/step"] == list(range(12))


def test_rows_logged_at_the_resumed_step_before_its_checkpoint_stay(tmp_path):
    with pytest.raises(Killed):
        trainer(tmp_path, 3).fit(Tiny(5), loader(), loader())
    with open(tmp_path / "metrics.csv", "a") as file:
        file.write("3,,diagnostic,0.5\n")
    trainer(tmp_path, 3).fit(Tiny(value=100.0), loader(), loader(), ckpt_path=tmp_path / "checkpoints" / "last.ckpt")
    at_three = [(name, value) for step, name, value in table(tmp_path) if step == 3]
    assert at_three == [("train/step", 3.0), ("val/step", 4.0), ("diagnostic", 0.5)]


def test_a_fit_from_scratch_sets_the_old_file_aside(tmp_path):
    for value in (0.0, 100.0, 200.0):
        trainer(tmp_path).fit(Tiny(value=value), loader(), loader())
    firsts = [
        (tmp_path / name).read_text().splitlines()[1] for name in ("metrics.1.csv", "metrics.2.csv", "metrics.csv")
    ]
    assert firsts == ["0,0,train/step,0.0", "0,0,train/step,100.0", "0,0,train/step,200.0"]


def test_a_lone_test_writes_nothing_and_one_after_a_fit_appends(tmp_path):
    run = trainer(tmp_path)
    run.fit(Tiny(), loader(), loader())
    fitted = table(tmp_path)
    run.test(Tiny(), loader(), verbose=False)
    after = table(tmp_path)
    assert after == [*fitted, (12, "test/one", 1.0)]
    trainer(tmp_path).test(Tiny(), loader(), verbose=False)
    assert table(tmp_path) == after


def test_checkpoints_lie_in_the_run_folder(tmp_path):
    run = trainer(tmp_path)
    run.fit(Tiny(), loader(), loader())
    assert (tmp_path / "checkpoints" / "last.ckpt").exists()
    assert run.log_dir == str(tmp_path)


def test_an_unwritable_folder_is_one_line_naming_the_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cannot write .*file/run/metrics.csv \(Not a directory\): free the disk"):
        MetricsCSV(str(tmp_path / "file" / "run")).log_metrics({"a": 1.0}, step=0)
