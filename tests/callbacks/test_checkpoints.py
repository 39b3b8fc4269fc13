"""When the last checkpoint is renewed, and that one is whole at every moment."""

import os
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from moe_peft.callbacks.checkpoints import AdapterCheckpoint


class Worsening(pl.LightningModule):
    """Validates worse every time."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)

    def training_step(self, batch, _):
        return self.layer(batch[0]).sum()

    def validation_step(self, *_):
        self.log("val/mean", torch.tensor(-float(self.global_step)))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class LastStep(pl.Callback):
    """Reads the last checkpoint's step within every step."""

    def __init__(self, file):
        self.file, self.seen = file, {}

    def on_before_zero_grad(self, trainer, *_):
        if self.file.exists():
            self.seen[trainer.global_step] = torch.load(self.file, weights_only=True)["global_step"]


def fit(folder, *callbacks, epochs=3, resume=None, **options):
    """Fits twelve micro-batches, in so many epochs."""
    rows = DataLoader(TensorDataset(torch.ones(12 // epochs, 2)))
    trainer = pl.Trainer(
        max_epochs=epochs,
        callbacks=list(callbacks),
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(Worsening(), rows, rows, ckpt_path=resume)


@pytest.mark.parametrize("interval", [1.0, 2])
def test_a_validation_that_is_no_better_renews_the_last_checkpoint(tmp_path, interval):
    watch = LastStep(tmp_path / "checkpoints" / "last.ckpt")
    fit(tmp_path, watch, AdapterCheckpoint(), val_check_interval=interval)
    every = 4 if interval == 1.0 else 2
    assert watch.seen == {step: step // every * every for step in range(every, 12)}
    best = torch.load(tmp_path / "checkpoints" / "best.ckpt", weights_only=True)
    assert best["global_step"] == every and torch.load(watch.file, weights_only=True)["global_step"] == 12


class Clock(pl.Callback):
    """Stands in for the module `time`; every micro-batch takes 20 seconds."""

    def __init__(self):
        self.seconds = 1000.0

    def monotonic(self):
        return self.seconds

    def on_train_batch_end(self, *_):
        self.seconds += 20


@pytest.mark.parametrize(
    ("accumulation", "expected"),
    [(1, {step: step // 3 * 3 for step in range(3, 12)}), (2, {2: 2, 3: 2, 4: 4, 5: 4})],
)
def test_the_last_checkpoint_is_renewed_by_the_clock(tmp_path, monkeypatch, accumulation, expected):
    clock, watch = Clock(), LastStep(tmp_path / "checkpoints" / "last.ckpt")
    monkeypatch.setattr("moe_peft.callbacks.checkpoints.time", clock)
    timed = AdapterCheckpoint(every_n_minutes=1)
    fit(tmp_path, clock, watch, timed, epochs=1, accumulate_grad_batches=accumulation)
    assert watch.seen == expected


def test_rank_zeros_clock_decides(tmp_path, monkeypatch):
    strategy = "lightning.pytorch.strategies.SingleDeviceStrategy"
    monkeypatch.setattr(f"{strategy}.broadcast", lambda _, own, src=0: own is False or own)
    watch = LastStep(tmp_path / "checkpoints" / "last.ckpt")
    fit(tmp_path, watch, AdapterCheckpoint(every_n_minutes=60))
    assert watch.seen == {step: step for step in range(1, 12)}


@pytest.mark.parametrize("option", ["every_n_minutes", "every_n_train_steps"])
def test_an_interval_of_nothing_is_refused(option):
    with pytest.raises(ValueError, match=f"{option}=0 must be"):
        AdapterCheckpoint(**{option: 0})


def half(folder):
    """The first eight steps of twelve; returns the best checkpoint's content."""
    fit(folder, AdapterCheckpoint(), max_steps=8)
    return (folder / "checkpoints" / "best.ckpt").read_bytes()


@pytest.mark.parametrize("name", ["last", "last.previous"])
def test_a_run_that_was_renamed_keeps_its_best(tmp_path, name):
    best, kept = half(tmp_path / "old"), AdapterCheckpoint()
    (tmp_path / "old").rename(tmp_path / "new")
    fit(tmp_path / "new", kept, resume=tmp_path / "new" / "checkpoints" / f"{name}.ckpt")
    assert Path(kept.best_model_path).read_bytes() == best
    assert kept.best_model_path == str(tmp_path / "new" / "checkpoints" / "best.ckpt")


def test_a_fit_that_goes_on_elsewhere_has_a_best_of_its_own(tmp_path):
    best, kept = half(tmp_path / "one"), AdapterCheckpoint()
    fit(tmp_path / "two", kept, resume=tmp_path / "one" / "checkpoints" / "last.ckpt")
    assert kept.best_model_path == str(tmp_path / "two" / "checkpoints" / "best.ckpt")
    assert (tmp_path / "one" / "checkpoints" / "best.ckpt").read_bytes() == best


def test_a_whole_checkpoint_is_on_the_disk_at_every_moment(tmp_path, monkeypatch):
    events, folder = [], tmp_path / "checkpoints"

    def watched(name, real):
        def call(argument, *more):
            events.append((name, getattr(argument, "name", ""), whole()))
            result = real(argument, *more)
            events.append(("done", "", whole()))
            return result

        return call

    def whole():
        there = [file for file in (folder / "last.ckpt", folder / "last.previous.ckpt") if file.is_file()]
        return [torch.load(file, weights_only=True)["global_step"] for file in there]

    monkeypatch.setattr(os, "fsync", watched("fsync", os.fsync))
    monkeypatch.setattr(Path, "replace", watched("replace", Path.replace))
    fit(tmp_path, AdapterCheckpoint(monitor=None, every_n_train_steps=1), limit_val_batches=0)
    first = next(at for at, event in enumerate(events) if event[2])
    assert all(steps for _, _, steps in events[first:])
    assert whole() == [12, 11]
    last = [(name, file) for name, file, _ in events if name != "done"][-3:]
    assert last == [("fsync", ""), ("replace", "last.ckpt"), ("replace", "last.ckpt.part")]


def test_a_checkpoint_that_was_cut_off_does_not_push_out_the_one_before(tmp_path):
    last, before = (tmp_path / "checkpoints" / name for name in ("last.ckpt", "last.previous.ckpt"))
    fit(tmp_path, AdapterCheckpoint(every_n_train_steps=1))
    os.truncate(last, last.stat().st_size // 2)
    last.with_name("best.ckpt.part").write_bytes(b"half")
    fit(tmp_path, AdapterCheckpoint(), max_steps=1, limit_val_batches=0)
    assert not list(last.parent.glob("*.part"))
    assert [torch.load(file, weights_only=True)["global_step"] for file in (last, before)] == [1, 11]
