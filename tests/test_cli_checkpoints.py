"""What a finished run and its checkpoints refuse: another base, method, task list or argument, and files of others."""

import shutil

import pytest
import torch
import yaml

from moe_peft.cli import run
from tests.tiny_runs import config, files, one_error, results, save_backbone, world  # noqa: F401  (fixtures)


@pytest.fixture(scope="module")
def fitted(world, tmp_path_factory):  # noqa: F811
    """The run folder of a short fit; read-only."""
    folder = tmp_path_factory.mktemp("fitted") / "run"
    world.fit(folder, None, "--trainer.max_epochs=1", "--trainer.logger=false")
    return folder


@pytest.fixture
def test_refused(fitted, tmp_path, capsys):
    """Runs `test` on that run with a changed configuration and returns its one line."""

    def test(change, checkpoint=None, *more):
        made = yaml.safe_load((fitted / "config.yaml").read_text())
        change(made)
        made["trainer"]["default_root_dir"] = str(tmp_path / "elsewhere")
        file = tmp_path / "test.yaml"
        file.write_text(yaml.safe_dump(made))
        checkpoint = checkpoint or fitted / "checkpoints" / "best.ckpt"
        line = one_error(capsys, "test", f"--config={file}", f"--ckpt_path={checkpoint}", *more)
        assert not (tmp_path / "elsewhere").is_dir() or files(tmp_path / "elsewhere") == {}
        return line

    return test


def test_an_existing_run_is_refused_and_left_alone(fitted, config, capsys):  # noqa: F811
    before = files(fitted)
    line = one_error(capsys, "fit", f"--config={config}", f"--trainer.default_root_dir={fitted}")
    assert "already holds a run; name another folder, or resume it with --ckpt_path last" in line
    assert files(fitted) == before


def model_of(made):
    """The model's arguments."""
    return made["model"]["init_args"]


def test_a_typed_argument_that_contradicts_the_checkpoint(test_refused):
    line = test_refused(lambda made: None, None, "--model.r1=3")
    assert "model.r1 is 3 here and 2 in the checkpoint: use the checkpoint's value" in line


def test_a_checkpoint_of_another_rank(test_refused):
    assert "model.r2 is 4 here and 3 in the checkpoint" in test_refused(lambda made: model_of(made).update(r2=4))


def test_a_checkpoint_of_another_method(test_refused):
    def change(made):
        made["model"] = {"class_path": "LoRA", "init_args": {"backbone": model_of(made)["backbone"]}}

    assert "methods.lora.LoRA' here and 'moe_peft.methods.trex.TRex' in the checkpoint" in test_refused(change)


def test_a_checkpoint_of_another_task_list(test_refused):
    line = test_refused(lambda made: made["data"]["init_args"]["tasks"].reverse())
    assert "it has ['tone', 'next'], this run ['next', 'tone']; configure the same tasks" in line


def test_a_checkpoint_of_another_base(test_refused, tmp_path):
    import transformers

    other = save_backbone(tmp_path / "other", "causal")
    model = transformers.AutoModelForCausalLM.from_pretrained(other)
    model.lm_head.weight.data.add_(0.01)
    model.save_pretrained(other)
    line = test_refused(lambda made: model_of(made)["backbone"]["init_args"].update(name=str(other)))
    assert "checkpoint of another fingerprint" in line and "configure its backbone" in line


def test_the_same_base_in_another_folder_is_the_same_base(fitted, tmp_path):
    made = yaml.safe_load((fitted / "config.yaml").read_text())
    moved = shutil.copytree(model_of(made)["backbone"]["init_args"]["name"], tmp_path / "moved")
    model_of(made)["backbone"]["init_args"]["name"] = str(moved)
    made["trainer"]["default_root_dir"] = str(tmp_path / "run")
    (tmp_path / "test.yaml").write_text(yaml.safe_dump(made))
    run(["test", f"--config={tmp_path}/test.yaml", f"--ckpt_path={fitted}/checkpoints/best.ckpt"])
    assert results(tmp_path / "run/results.test-best.json")["rows"] == results(fitted / "results.json")["rows"]


@pytest.mark.parametrize(
    "make, expected",
    [
        (lambda whole: whole[: len(whole) // 2], "is truncated or no checkpoint: give a whole file"),
        (lambda whole: b"hello", "is truncated or no checkpoint: give a whole file"),
        (lambda whole: None, "is no file; give a checkpoint"),
    ],
    ids=["truncated", "text", "missing"],
)
def test_a_file_that_is_no_checkpoint(fitted, test_refused, tmp_path, make, expected):
    file = tmp_path / "odd.ckpt"
    content = make((fitted / "checkpoints/best.ckpt").read_bytes())
    if content is not None:
        file.write_bytes(content)
    line = test_refused(lambda made: None, file)
    assert str(file) in line and expected in line


def test_a_checkpoint_of_another_program(test_refused, tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    line = test_refused(lambda made: None, tmp_path / "other.ckpt")
    assert "is no moe_peft checkpoint: give a file written by `moe_peft fit`" in line


def test_a_learning_rate_that_a_resumed_fit_would_drop(fitted, config, capsys):  # noqa: F811
    before = files(fitted)
    line = one_error(
        capsys,
        "fit",
        f"--config={fitted}/config.yaml",
        "--ckpt_path=last",
        "--trainer.max_epochs=2",
        "--model.optimizer.lr=0.5",
    )
    assert "model.optimizer.lr is 0.5 here and 0.01 in the checkpoint" in line
    assert files(fitted) == before
