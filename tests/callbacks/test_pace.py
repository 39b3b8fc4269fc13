"""The clock of a fit, with a clock that is wound by hand; and how many validations a trainer really runs."""

import math

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

from moe_peft.callbacks.pace import Left, Pace, Schedule, time_limit


class Clock:
    """Seconds, wound by hand."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def steps(pace, clock, *seconds, tokens=100):
    for each in seconds:
        clock.now += each
        pace.step(tokens)


def test_the_first_step_counts_only_until_there_is_another(clock):
    pace = Pace(20, clock)
    assert pace.seconds_per_step is None and pace.tokens_per_second is None
    steps(pace, clock, 60.0)
    assert pace.seconds_per_step == 60 and pace.tokens_per_second == 100 / 60
    steps(pace, clock, 2.0, 4.0)
    assert pace.seconds_per_step == 3 and pace.tokens_per_second == 200 / 6


def test_speeds_are_of_the_last_steps(clock):
    pace = Pace(2, clock)
    steps(pace, clock, 9.0, 9.0, 9.0, 1.0, 2.0)
    assert pace.seconds_per_step == 1.5 and pace.tokens_per_second == 200 / 3


def test_validations_are_no_part_of_steps_and_a_part_of_what_is_left(clock):
    pace = Pace(20, clock)
    steps(pace, clock, 1.0, 2.0, 2.0)
    assert pace.left(10, 2) == Left(20.0, whole=False)
    pace.begin_validation()
    clock.now += 30
    assert pace.end_validation() == 30
    steps(pace, clock, 2.0)
    assert pace.seconds_per_step == 2
    assert pace.left(9, 1) == Left(18.0 + 30.0, whole=True)
    assert pace.left(9, 0) == Left(18.0, whole=True)
    pace.begin_validation()
    clock.now += 12
    assert pace.left(9, 1) == Left(18.0 + 18.0, whole=True)
    clock.now += 100  # it takes longer than the first
    assert pace.left(9, 1) == Left(18.0, whole=True)
    assert pace.elapsed == 7 + 30 + 2 - 2 + 112


def test_a_time_limit_ends_what_would_last_longer(clock):
    pace = Pace(20, clock)
    steps(pace, clock, 1.0, 2.0)
    assert pace.left(10, 0, limit=5.0) == Left(5.0, whole=True)
    assert pace.left(10, 3, limit=5.0) == Left(5.0, whole=True)
    assert pace.left(10, 0, limit=50.0) == Left(20.0, whole=True)
    assert pace.left(math.inf, 0, limit=50.0) == Left(50.0, whole=True)
    assert pace.left(math.inf, 0) is None


class Counting(pl.LightningModule):
    """Counts its validations, and asks a schedule after every optimizer step how many are to come."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.ran, self.asked = 0, {}

    def training_step(self, batch, batch_idx):
        return self.layer(batch).sum()

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def on_train_batch_start(self, batch, batch_idx):
        step = self.trainer.global_step
        if step not in self.asked:  # where a validation of the last step is over
            self.schedule = Schedule(self.trainer)
            self.asked[step] = self.schedule.validations_after(step), self.ran

    def on_validation_end(self):
        self.ran += 1


@pytest.mark.parametrize(
    "options",
    [
        {"max_epochs": 3},
        {"max_epochs": 3, "val_check_interval": 4},
        {"max_epochs": 2, "val_check_interval": 0.5},
        {"max_epochs": 5, "check_val_every_n_epoch": 2},
        {"max_epochs": 5, "check_val_every_n_epoch": 2, "val_check_interval": 4},
        {"max_epochs": 3, "check_val_every_n_epoch": None, "val_check_interval": 7},
        {"max_epochs": 3, "accumulate_grad_batches": 3},
        {"max_epochs": 3, "accumulate_grad_batches": 2, "val_check_interval": 4},
        {"max_epochs": 3, "limit_train_batches": 5, "accumulate_grad_batches": 2},
        {"max_epochs": -1, "max_steps": 13, "val_check_interval": 4},
        {"max_epochs": 9, "max_steps": 13},
        {"max_epochs": 2, "limit_val_batches": 0},
    ],
    ids=str,
)
def test_validations_to_come_are_those_that_come(tmp_path, options):
    module, rows = Counting(), DataLoader(torch.randn(10, 1))
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    trainer = pl.Trainer(default_root_dir=tmp_path, accelerator="cpu", enable_checkpointing=False, **quiet | options)
    trainer.fit(module, rows, DataLoader(torch.zeros(2, 1)))
    assert module.schedule.total == trainer.global_step and module.schedule.counted
    assert len(module.asked) == trainer.global_step
    assert module.asked == {step: (module.ran - ran, ran) for step, (_, ran) in module.asked.items()}
    assert (module.ran == 0) == (options.get("limit_val_batches") == 0)


def test_validations_by_the_clock_are_not_counted(tmp_path):
    module, rows = Counting(), DataLoader(torch.randn(10, 1))
    trainer = pl.Trainer(
        default_root_dir=tmp_path, accelerator="cpu", enable_checkpointing=False, logger=False, max_epochs=1,
        enable_progress_bar=False, enable_model_summary=False, val_check_interval="00:01:00:00", max_time="00:02:00:00",
    )  # fmt: skip
    assert time_limit(trainer) == 7200
    trainer.fit(module, rows, DataLoader(torch.zeros(2, 1)))
    assert not module.schedule.counted and 7100 < time_limit(trainer) < 7200
