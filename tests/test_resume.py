"""A fit that was broken off, or is to go on for longer, continues as if nothing had happened."""

import pytest
import torch

from tests.tiny_fits import lora, whole  # noqa: F401  (a fixture)
from tests.tiny_runs import metrics, recorded, results, world  # noqa: F401  (a fixture)


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
    lines = recorded(folder)
    assert len(lines) == stop + 12 - saved
    assert lines[:stop] == recorded(whole)[:stop]
    assert lines[stop:] == recorded(whole)[saved:]
    assert metrics(folder, "train/loss") == metrics(whole, "train/loss")
    assert metrics(folder, "val/mean") == metrics(whole, "val/mean")
    assert results(folder / "results.json")["rows"] == results(whole / "results.json")["rows"]


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
    assert torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)["global_step"] == 5


def test_saving_often_does_not_keep_validations_from_saving(world, whole, tmp_path):  # noqa: F811
    world.fit(tmp_path / "run", None, "--checkpoint.every_n_train_steps=3")
    best, there = (
        torch.load(folder / "checkpoints/best.ckpt", weights_only=True) for folder in (tmp_path / "run", whole)
    )
    assert best["global_step"] == there["global_step"]
