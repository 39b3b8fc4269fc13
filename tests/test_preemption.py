"""Signals that end a fit: it is saved where an optimizer step begins, and goes on as if nothing had happened."""

import signal

import pytest

from tests.tiny_kills import adding, assert_uninterrupted, step_of
from tests.tiny_runs import metrics, recorded, world  # noqa: F401  (a fixture)


def config(world, after=None):  # noqa: F811
    """Optimizer steps of four micro-batches, six to an epoch; signals after some of them."""
    made = world.config()
    made["trainer"]["accumulate_grad_batches"] = 4
    return adding(made, "Signals", after=after or {})


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):  # noqa: F811
    """The run folder of an uninterrupted fit; read-only."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    world.fit(folder, config(world))
    return folder


def ended(world, folder, made, *more):  # noqa: F811
    """Fits until a signal ends it; returns the exit status."""
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as caught:
        world.fit(folder, made, *more)
    assert signal.getsignal(signal.SIGTERM) is before
    return caught.value.code


@pytest.mark.parametrize(
    ("after", "stopped"), [(9, 3), (23, 6), (47, 12)], ids=["within a step", "before a validation", "at the end"]
)
def test_sigterm_ends_a_fit_between_two_steps(world, whole, tmp_path, caplog, capfd, after, stopped):  # noqa: F811
    folder = tmp_path / "run"
    assert ended(world, folder, config(world, {after: "SIGTERM"})) == 143
    last = folder / "checkpoints/last.ckpt"
    said = [record.message for record in caplog.records if "SIGTERM" in record.message]
    assert said == [
        f"SIGTERM: stopped at step {stopped}, saved {last}; go on with the same command and --ckpt_path last"
    ]
    assert step_of(last) == stopped and len(recorded(folder)) == 4 * stopped
    assert not (folder / "results.json").exists() and "Traceback" not in capfd.readouterr().err

    world.fit(folder, config(world), "--ckpt_path=last")
    assert_uninterrupted(folder, whole, interruptions=0)


def test_sigterm_ends_the_test_after_a_fit_at_once(world, whole, tmp_path, monkeypatch):  # noqa: F811
    from moe_peft.callbacks.results import Results

    folder = tmp_path / "run"
    monkeypatch.setattr(Results, "on_test_start", lambda *_: signal.raise_signal(signal.SIGTERM))
    made = config(world)
    assert ended(world, folder, made) == 143
    monkeypatch.undo()
    world.fit(folder, made, "--ckpt_path=last")
    assert_uninterrupted(folder, whole, interruptions=0)


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """A SLURM job of one task; returns the file that its `scontrol` writes what it was asked into."""
    asked, tool = tmp_path / "asked", tmp_path / "bin" / "scontrol"
    tool.parent.mkdir()
    tool.write_text(f'#!/bin/sh\necho "$@" >> {asked}\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tool.parent), prepend=":")
    for name, value in {"NTASKS": 1, "JOB_ID": 7, "PROCID": 0, "LOCALID": 0, "NODEID": 0, "JOB_NAME": "fit"}.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    return asked


@pytest.mark.parametrize("spoilt", [False, True], ids=["whole", "cut off"])
def test_a_requeued_slurm_job_goes_on_by_itself(world, whole, tmp_path, slurm, spoilt):  # noqa: F811
    folder = tmp_path / "run"
    made = config(world, {13: "SIGUSR1", 33: "SIGTERM"})  # the second is what requeueing does to the job
    assert ended(world, folder, made) == 143
    assert slurm.read_text() == "requeue 7\n"
    saved = folder / "hpc_ckpt_1.ckpt"
    assert step_of(saved) == 4 and len(recorded(folder)) == 36
    if spoilt:
        saved.write_bytes(saved.read_bytes()[:1000])
    world.fit(folder, config(world))
    assert recorded(folder)[36]["batch"] == (36 if spoilt else 16)
    assert_uninterrupted(folder, whole)


def test_the_step_that_a_signal_came_in_is_logged(world, tmp_path):  # noqa: F811
    folder = tmp_path / "run"
    ended(world, folder, config(world, {9: "SIGTERM"}))
    assert [step for step, _ in metrics(folder, "train/loss")] == [0, 1, 2]
