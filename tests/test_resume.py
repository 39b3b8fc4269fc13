"""A fit that was broken off, or is to go on for longer, continues as if nothing had happened."""

import pytest
import torch

from tests.tiny_fits import fit_of, lora, whole  # noqa: F401  (a fixture)
from tests.tiny_kills import adding, assert_uninterrupted, step_of
from tests.tiny_runs import metrics, one_error, recorded, results, world  # noqa: F401  (a fixture)


def recorder(config):
    """The arguments of a configuration's Recorder."""
    return config["trainer"]["callbacks"][-1].setdefault("init_args", {})


@pytest.mark.parametrize(
    "stop, saved", [(8, 6), (5, 4), (10, 8)], ids=["after an epoch", "in the first epoch", "in the second epoch"]
)
def test_a_killed_fit_goes_on_as_if_nothing_had_happened(world, whole, tmp_path, stop, saved):  # noqa: F811
    folder, config = tmp_path / "run", world.config()
    recorder(config)["stop_at"] = stop
    often = [] if saved == 6 else ["--checkpoint.every_n_train_steps=4"]
    with pytest.raises(RuntimeError, match="killed"):
        world.fit(folder, config, *often)
    world.fit(folder, world.config(), "--ckpt_path=last", *often)
    assert len(recorded(folder)) == stop + 12 - saved
    assert_uninterrupted(folder, whole)


@pytest.mark.parametrize("method", [lora, lambda config: config], ids=["LoRA", "T-REX"])
def test_a_finished_fit_goes_on_with_more_epochs(world, tmp_path, method):  # noqa: F811
    def config(epochs):
        made = method(world.config())
        made["trainer"]["max_epochs"] = epochs
        made["model"]["init_args"]["scheduler"] = {
            "class_path": "moe_peft.optim.WarmupDecay",
            "init_args": {"warmup": 2.0, "decay": "constant"},
        }
        return made

    world.fit(tmp_path / "long", config(2))
    world.fit(tmp_path / "run", config(1))
    world.fit(tmp_path / "run", config(2), "--ckpt_path=last")
    assert recorded(tmp_path / "run") == recorded(tmp_path / "long")
    for name in ("train/loss", "val/mean"):
        assert metrics(tmp_path / "run", name) == metrics(tmp_path / "long", name)
    assert results(tmp_path / "run" / "results.json")["rows"] == results(tmp_path / "long" / "results.json")["rows"]


def test_a_longer_fit_has_the_longer_schedules_rate_from_its_first_step(world, tmp_path):  # noqa: F811
    def config(epochs):
        made = world.config()
        made["trainer"]["max_epochs"] = epochs
        made["trainer"]["callbacks"].append({"class_path": "lightning.pytorch.callbacks.LearningRateMonitor"})
        return made

    world.fit(tmp_path / "long", config(2))
    world.fit(tmp_path / "run", config(1))
    world.fit(tmp_path / "run", config(2), "--ckpt_path=last")
    name = "lr-AdamW/adapters"
    assert metrics(tmp_path / "run", name)[6:] == metrics(tmp_path / "long", name)[6:]


def test_the_last_checkpoint_is_that_of_the_last_step(world, tmp_path):  # noqa: F811
    world.fit(tmp_path / "run", None, "--trainer.max_steps=5", "--checkpoint.every_n_train_steps=2")
    assert step_of(tmp_path / "run/checkpoints/last.ckpt") == 5


def test_saving_often_does_not_keep_validations_from_saving(world, whole, tmp_path):  # noqa: F811
    world.fit(tmp_path / "run", None, "--checkpoint.every_n_train_steps=3")
    assert step_of(tmp_path / "run/checkpoints/best.ckpt") == step_of(whole / "checkpoints/best.ckpt")


def accumulating(world, steps=4):  # noqa: F811
    """Optimizer steps of several micro-batches."""
    config = world.config()
    config["trainer"]["accumulate_grad_batches"] = steps
    return config


accumulated = fit_of(accumulating)


@pytest.mark.parametrize("after", [9, 25], ids=["third step", "first step of the second epoch"])
def test_a_checkpoint_from_within_a_step_is_taken_from_its_beginning(world, accumulated, tmp_path, after):  # noqa: F811
    folder, config = tmp_path / "run", adding(accumulating(world), "Own", after=after)
    config["trainer"]["callbacks"][1]["init_args"] = {"stop_at": after // 4 + 2}
    with pytest.raises(RuntimeError, match="killed"):
        world.fit(folder, config)
    ran = len(recorded(folder))
    world.fit(folder, accumulating(world), f"--ckpt_path={folder}/own.ckpt")
    assert recorded(folder)[ran]["batch"] == after // 4 * 4
    assert_uninterrupted(folder, accumulated)


def test_a_validation_after_half_a_step_is_refused(world, tmp_path, capsys):  # noqa: F811
    file = world.write(tmp_path / "config.yaml", accumulating(world))
    arguments = (f"--config={file}", f"--trainer.default_root_dir={tmp_path}/run", "--trainer.val_check_interval=6")
    line = one_error(capsys, "fit", *arguments)
    assert "val_check_interval=6: a validation every 6 batches falls within" in line and "use a multiple of 4" in line


def test_other_worker_processes_change_nothing(world, whole, tmp_path):  # noqa: F811
    folder, config = tmp_path / "run", world.config()
    recorder(config)["stop_at"] = 3
    often = "--checkpoint.every_n_train_steps=2"
    with pytest.raises(RuntimeError, match="killed"):
        world.fit(folder, config, often)
    world.fit(folder, world.config(), "--ckpt_path=last", often, "--data.num_workers=2")
    assert recorded(folder)[3]["batch"] == 2
    assert_uninterrupted(folder, whole)


def test_what_rounding_depends_on_is_compared(world, tmp_path, caplog):  # noqa: F811
    world.fit(tmp_path / "run", None, "--trainer.max_epochs=1")
    threads = torch.get_num_threads()
    for here, lines in ((threads, []), (threads + 1, [f"not bit for bit: threads is {threads + 1} and was {threads}"])):
        caplog.clear()
        torch.set_num_threads(here)
        try:
            world.fit(tmp_path / "run", None, "--ckpt_path=last", f"--trainer.max_epochs={2 + len(lines)}")
        finally:
            torch.set_num_threads(threads)
        said = [record.message for record in caplog.records if "bit for bit" in record.message]
        assert len(said) == len(lines) and all(line in said[0] for line in lines)


@pytest.fixture
def stopped(world, tmp_path):  # noqa: F811
    """The run folder of a fit that was killed after seven steps, with checkpoints of steps six and four."""
    folder, config = tmp_path / "run", world.config()
    recorder(config)["stop_at"] = 7
    with pytest.raises(RuntimeError, match="killed"):
        world.fit(folder, config, "--checkpoint.every_n_train_steps=2")
    saved = {file.name: step_of(file) for file in (folder / "checkpoints").glob("last*")}
    assert saved == {"last.ckpt": 6, "last.previous.ckpt": 4}
    return folder


@pytest.mark.parametrize("given", ["last", "{folder}/checkpoints/last.ckpt"], ids=["word", "path"])
@pytest.mark.parametrize("spoil", [lambda file: file.unlink(), lambda file: halve(file)], ids=["missing", "cut off"])
def test_the_checkpoint_before_a_spoilt_one_is_used(world, whole, stopped, caplog, spoil, given):  # noqa: F811
    last, before = stopped / "checkpoints/last.ckpt", stopped / "checkpoints/last.previous.ckpt"
    spoil(last)
    world.fit(stopped, world.config(), f"--ckpt_path={given.format(folder=stopped)}")
    said = [record.message for record in caplog.records if "cut off" in record.message]
    assert said == [f"{last} is missing or cut off: going on from the one before it, {before} (step 4)"]
    assert recorded(stopped)[7]["batch"] == 4
    assert_uninterrupted(stopped, whole)


def test_two_spoilt_checkpoints_are_an_error(world, stopped, capsys):  # noqa: F811
    for name in ("last.ckpt", "last.previous.ckpt"):
        halve(stopped / "checkpoints" / name)
    line = one_error(capsys, "fit", f"--config={stopped}/config.yaml", "--ckpt_path=last")
    assert "last.ckpt' is truncated or no checkpoint" in line


def halve(file):
    """Cuts a file off."""
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
