"""kill -9 of real `python -m moe_peft fit` processes at random moments: what is resumed is what would have been."""

import random
import shutil
import signal
import time

import pytest
import torch

from tests.tiny_kills import adding, assert_uninterrupted, finish, start, stop, wait_for
from tests.tiny_runs import recorded, world  # noqa: F401  (a fixture)

pytestmark = pytest.mark.slow
PAUSE = 0.03
BATCHES = 36


@pytest.fixture(autouse=True)
def one_thread():
    """What all processes that are compared have."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def trex(world, workers=0):  # noqa: F811
    """Three epochs of six steps of two micro-batches, with dropout; a validation in the middle of an epoch too."""
    config = world.config()
    config["data"]["init_args"]["num_workers"] = workers
    config["trainer"] |= {"max_epochs": 3, "accumulate_grad_batches": 2, "val_check_interval": 6}
    config["trainer"]["callbacks"][-1]["init_args"] = {"pause": PAUSE}
    config["checkpoint"] = {"every_n_train_steps": 1}
    return config


def experts_and_router(world, workers=0):  # noqa: F811
    """The same of TT-LoRA MoE: one epoch for the experts, then the router's stage."""
    config = trex(world, workers)
    other = world.config(("tone", "mood"), "classifier", "TTLoRAMoE")
    config["model"], config["data"]["init_args"]["tasks"] = other["model"], other["data"]["init_args"]["tasks"]
    config["trainer"]["callbacks"][0] = other["trainer"]["callbacks"][0]
    return config


def reached(folder, batch, rank=0):
    """Whether there is something to go on from, and a micro-batch has been trained on."""
    if not (folder / "checkpoints/last.ckpt").exists():
        return False
    return any(line["batch"] >= batch and line["rank"] == rank for line in recorded(folder))


@pytest.mark.parametrize(("make", "seed"), [(trex, 1), (experts_and_router, 2)], ids=["T-REX", "TT-LoRA MoE"])
def test_a_run_killed_time_and_again_is_what_it_would_have_been(world, tmp_path, make, seed):  # noqa: F811
    world.fit(tmp_path / "whole", make(world))
    folder, draw = tmp_path / "run", random.Random(seed)
    parts = 6  # five kills at random moments, one within each part of the run; the last process goes through
    for part in range(1, parts + 1):
        file = world.write(tmp_path / "config.yaml", make(world, workers=part % 2 * 2))
        process = start(file, folder, *(["--ckpt_path=last"] if part > 1 else []))
        if part < parts:
            batch = draw.randrange((part - 1) * BATCHES // parts, part * BATCHES // parts)
            wait_for(process, lambda at=batch: reached(folder, at))
            time.sleep(draw.uniform(0, 3 * PAUSE))
            stop(process, signal.SIGKILL)
        finish(process, folder, -signal.SIGKILL if part < parts else 0)
    assert len(recorded(tmp_path / "whole")) == BATCHES
    assert_uninterrupted(folder, tmp_path / "whole", interruptions=parts - 1)


def test_a_kill_while_a_checkpoint_is_written_and_a_sigterm_to_all_processes(world, tmp_path):  # noqa: F811
    world.fit(tmp_path / "whole", trex(world))
    folder = tmp_path / "run"
    file = world.write(tmp_path / "killed.yaml", adding(trex(world), "HalfWritten", number=4))
    finish(start(file, folder), folder, -signal.SIGKILL)
    assert len(list((folder / "checkpoints").glob("*.part"))) == 1

    file = world.write(tmp_path / "config.yaml", trex(world, workers=2))
    process = start(file, folder, "--ckpt_path=last")
    wait_for(process, lambda: reached(folder, 17))
    stop(process, signal.SIGTERM)
    said = finish(process, folder, 143).splitlines()
    assert not list((folder / "checkpoints").glob("*.part"))
    assert sum("SIGTERM: stopped at step" in line for line in said) == 1 and "Traceback" not in "".join(said)
    assert not (folder / "results.json").exists()

    finish(start(file, folder, "--ckpt_path=last"), folder)
    assert_uninterrupted(folder, tmp_path / "whole", interruptions=1)


def test_a_kill_of_two_processes_and_a_sigterm_to_the_first(world, tmp_path):  # noqa: F811
    config = trex(world)
    config["trainer"] |= {"devices": 2, "strategy": "ddp", "max_epochs": 2}
    file, folder, alone = world.write(tmp_path / "config.yaml", config), tmp_path / "run", tmp_path / "alone"
    finish(start(file, tmp_path / "whole"), tmp_path / "whole")
    process = start(file, folder)
    wait_for(process, lambda: reached(folder, 7))
    stop(process, signal.SIGKILL)
    finish(process, folder, -signal.SIGKILL)
    shutil.copytree(folder, alone)

    process = start(file, folder, "--ckpt_path=last")
    wait_for(process, lambda: reached(folder, 15))
    process.terminate()
    said = finish(process, folder, 143)
    assert said.count("SIGTERM: stopped at step") == 1 and "Traceback" not in said and "bit for bit" not in said
    finish(start(file, folder, "--ckpt_path=last"), folder)
    assert_uninterrupted(folder, tmp_path / "whole", ranks=2)

    one = ("--trainer.devices=1", "--trainer.strategy=auto", "--ckpt_path=last")
    said = finish(start(file, alone, *one), alone)
    assert "ranks is 1 and was 2" in said
    lines = {(line["batch"], line["rank"]): line["rows"] for line in recorded(tmp_path / "whole")}
    resumed = {line["batch"]: line["rows"] for line in recorded(alone) if len(line["rows"]) == 4}  # not two
    assert max(resumed) == 23 and all(rows == lines[at, 0] + lines[at, 1] for at, rows in resumed.items())
