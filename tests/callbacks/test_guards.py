"""Ranks that differ, parameters that nothing trains, losses that are not finite: one line, before harm is done."""

import os
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from moe_peft import agreement
from moe_peft.callbacks.guards import Guards
from moe_peft.methods.lora import LoRA
from tests.tiny import build, random_batch, randomise
from tests.tiny_runs import world  # noqa: F401  (a fixture)

ROOT = Path(__file__).parents[2]


class Half(LoRA):
    """Trains something that no forward reads."""

    def assemble(self):
        super().assemble()
        self.heads = nn.Linear(2, 2)  # type: ignore[assignment]

    def row_losses(self, batch):
        heads, self.heads = self.heads, None
        try:
            return super().row_losses(batch)
        finally:
            self.heads = heads


def fit(module, *batches):
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        callbacks=[Guards()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(list(batches), batch_size=None))


def test_a_parameter_without_a_gradient_is_named():
    with pytest.raises(ValueError, match=r"^step 0: heads\.weight got no gradient, .* no loss depends on it$"):
        fit(build(Half), random_batch())


def test_a_gradient_that_is_not_finite_is_named():
    module = build(LoRA)
    randomise(module)
    name, parameter = next((name, own) for name, own in module.named_parameters() if own.requires_grad)
    parameter.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(ValueError, match=f"^step 0: {name} got a gradient that is not finite"):
        fit(module, random_batch())


def test_a_loss_that_is_not_finite_names_tasks_and_rows_and_leaves_the_adapters_alone():
    module = build(LoRA)
    randomise(module)
    good, bad = random_batch(seed=1), random_batch(seed=2)
    before = {name: value.clone() for name, value in module.adapter_state().items()}
    bad["rows_share"] = 0.0
    with pytest.raises(ValueError, match=r"not finite at step 1: inf for rows row0, row1, .* of tone, topic; lower"):
        fit(module, good, bad)
    after = module.adapter_state()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert all(torch.isfinite(value).all() for value in after.values())


def test_adapters_that_are_not_finite_are_not_saved():
    module = build(LoRA)
    next(own for own in module.parameters() if own.requires_grad).data[0] = float("nan")
    with pytest.raises(ValueError, match=r"this step's model\.model.* not finite; nothing is saved; lower the l"):
        module.on_save_checkpoint({"state_dict": module.state_dict()})


@pytest.mark.parametrize(
    ("there", "line"),
    [
        ({"a": "1", "b": "3"}, "disagree on b: rank 0 has 2, rank 1 has 3"),
        ({"a": "1"}, "disagree on b: rank 0 has 2, rank 1 has none"),
        ({"a": "1", "b": "2", "c": "4"}, "disagree on c: rank 0 has none, rank 1 has 4"),
    ],
)
def test_the_first_thing_on_which_ranks_differ_is_named(monkeypatch, there, line):
    monkeypatch.setattr(agreement, "from_all_ranks", lambda own: [own, there])
    with pytest.raises(ValueError, match=line):
        agreement.agree({"a": "1", "b": "2"})


def test_ranks_that_agree_go_on(monkeypatch):
    monkeypatch.setattr(agreement, "from_all_ranks", lambda own: [own, dict(own)])
    agreement.agree({"a": "1", "b": "2"})


def two_processes(code: str, log: Path) -> tuple[int, str]:
    """Runs code on two ranks; returns the status of the launcher and what they wrote."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--no-python"]
    with log.open("w") as file:
        done = subprocess.run(
            [*command, sys.executable, "-c", code], cwd=ROOT, env=environment, stdout=file, stderr=file, timeout=300
        )
    return done.returncode, log.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_with_other_rows_stop_before_the_first_step(world, tmp_path, strategy):  # noqa: F811
    files = []
    for rank, train in enumerate((24, 25)):
        task = world.task(tmp_path / str(rank) / "tone", "tone", train)
        config = world.config(tasks=[task, world.tasks["next"]])
        config["trainer"] |= {"devices": 2, "strategy": strategy, "default_root_dir": str(tmp_path / "run")}
        files.append(str(world.write(tmp_path / f"{rank}.yaml", config)))
    code = f"import os; from moe_peft.cli import run; run(['fit', '--config', {files}[int(os.environ['RANK'])]])"
    status, said = two_processes(code, tmp_path / "log")
    assert status != 0
    assert "the ranks disagree on the training rows" in said
    assert not list((tmp_path / "run").rglob("*.ckpt"))


@pytest.mark.slow
def test_slices_of_adapters_that_were_drawn_differently_are_refused(world, tmp_path):  # noqa: F811
    config = world.config()
    config["trainer"] |= {"devices": 2, "strategy": "fsdp2", "default_root_dir": str(tmp_path / "run")}
    config["trainer"]["callbacks"].insert(0, {"class_path": "tests.callbacks.test_guards.OtherSeed"})
    file = world.write(tmp_path / "config.yaml", config)
    status, said = two_processes(f"from moe_peft.cli import run; run(['fit', '--config={file}'])", tmp_path / "log")
    assert status != 0
    assert "the ranks disagree on the start of model.model.layers.0.self_attn.q_proj.factors.A: rank 0 has" in said


@pytest.mark.slow
def test_a_loss_that_is_not_finite_on_one_rank_ends_both_and_keeps_the_last_checkpoint(world, tmp_path):  # noqa: F811
    config = world.config()
    config["trainer"] |= {"devices": 2, "strategy": "ddp", "default_root_dir": str(tmp_path / "run")}
    config["trainer"]["callbacks"].append({"class_path": "tests.callbacks.test_guards.Spoil"})
    file = world.write(tmp_path / "config.yaml", config)
    arguments = ["fit", f"--config={file}", "--checkpoint.every_n_train_steps=1"]
    code = f"from moe_peft.cli import run; run({arguments})"
    status, said = two_processes(code, tmp_path / "log")
    assert status != 0
    assert said.count("the loss is not finite at step 3: inf for rows") == 2
    saved = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    assert saved["global_step"] == 3
    assert all(torch.isfinite(value).all() for value in saved["state_dict"].values())


class OtherSeed(pl.Callback):
    """Lets every rank draw its own adapters."""

    def setup(self, trainer, pl_module, stage):
        torch.manual_seed(trainer.global_rank)


class Spoil(pl.Callback):
    """Makes the loss of rank one infinite in the fourth step."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 3 and trainer.global_rank == 1:
            batch["rows_share"] = 0.0
