"""What a step costs: the clock is the test's own."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

from moe_peft.callbacks import costs
from moe_peft.callbacks.costs import Costs, peak_resident


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass as the test says."""
    now = SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(costs.time, "perf_counter", lambda: now.seconds)
    return now


def train(callback, clock, trainer, durations, validate_after=None):
    """Goes through optimizer steps of two micro-batches each."""
    callback.on_train_start(trainer, None)
    for seconds in durations:
        for part in range(2):
            clock.seconds += seconds / 2
            trainer.global_step += part
            callback.on_train_batch_end(trainer, None)
        if validate_after == seconds:
            clock.seconds += 0.5  # belongs to the next step
            callback.on_validation_start(trainer, None)
            clock.seconds += 1000
            callback.on_validation_end(trainer, None)


def test_the_median_leaves_out_validations_and_the_first_step_after_each_start(tmp_path, clock):
    trainer = SimpleNamespace(global_step=0, is_global_zero=True, fast_dev_run=False, default_root_dir=tmp_path)
    first = Costs()
    train(first, clock, trainer, [50, 1, 2, 3], validate_after=2)
    second = Costs()
    second.load_state_dict(first.state_dict())
    train(second, clock, trainer, [70, 5, 4])
    second.on_fit_end(trainer, None)
    found = json.loads((tmp_path / "costs.json").read_text())
    assert found["steps_timed"] == 5 and found["step_seconds"] == 3.5  # of 1, 2, 3.5, 5, 4
    assert found["peak_resident_bytes"] > 2**20


def test_the_peak_is_the_process_own_and_not_its_parents():
    parent = b"x" * (400 * 2**20)
    script = "from moe_peft.callbacks.costs import peak_resident; print(peak_resident())"
    child = int(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout)
    assert peak_resident() - child > 0.5 * len(parent)
