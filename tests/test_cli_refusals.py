"""What data, model and machine may not be: refused in one line before any work, with nothing written."""

import json
import shutil
import subprocess

import pytest
import torch

from tests.tiny_runs import config, files, one_error, refused, world  # noqa: F401  (fixtures)


@pytest.fixture
def spoiled_task(world, tmp_path):  # noqa: F811
    """Writes a task folder with one row changed and returns its path."""

    def make(split, **changes):
        folder = world.task(tmp_path / "task", "next")
        file = folder / f"{split}.jsonl"
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        rows[3].update(changes)
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(folder)

    return make


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_a_task_folder_without_a_split(world, refused, tmp_path, split):  # noqa: F811
    folder = world.task(tmp_path / "task", "next")
    (folder / f"{split}.jsonl").unlink()
    line = refused(data={"tasks": [str(folder)]})
    assert f"has no {split}.jsonl" in line and str(folder) in line and f"add the {split} split" in line


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_a_label_outside_its_choices(refused, spoiled_task, split):  # noqa: F811
    line = refused(data={"tasks": [spoiled_task(split, label=9)]})
    assert f"task 'next', {split} row '" in line and "label 9 is outside its 3 choices; use 0..2" in line


def test_an_empty_text(refused, spoiled_task):  # noqa: F811
    assert "test row '2003': text ' ' is empty; fill it" in refused(data={"tasks": [spoiled_task("test", text=" ")]})


def test_equal_options(refused, spoiled_task):  # noqa: F811
    line = refused(data={"tasks": [spoiled_task("train", choices=["a", "a", "b"])]})
    assert "train row '3': two options are equal ('a')" in line and "equal_options: drop" in line


def test_a_template_that_names_a_missing_column(refused, world):  # noqa: F811
    source = {"class_path": "TaskFolder", "init_args": {"path": str(world.tasks["next"]), "template": "{question}"}}
    assert "the template names column 'question', which the row lacks; use one of" in refused(data={"tasks": [source]})


def test_an_answer_longer_than_the_limit(refused, world):  # noqa: F811
    line = refused(data={"tasks": [str(world.tasks["count"])], "max_length": 10})
    assert "rows have an answer that leaves no room" in line and "max_length=10" in line


def test_more_clusters_than_texts(refused):  # noqa: F811
    line = refused(model={"clusters": 1000})
    assert "clusters is 1000, but the 48 training texts hold only 48 different ones: lower clusters" in line


def test_a_target_that_matches_nothing(refused):  # noqa: F811
    line = refused(model={"targets": ["q_prj"]})
    assert "targets: ['q_prj'] matches no linear; this model has down_proj" in line


def test_a_method_with_a_prior_that_nothing_fits(refused):  # noqa: F811
    assert "the semantic prior is not fitted: add the SemanticPriorFit callback" in refused(trainer={"callbacks": []})


def test_a_batch_size_that_does_not_divide(refused):  # noqa: F811
    line = refused(trainer={"accumulate_grad_batches": 3})
    assert "batch_size=8 (global) must divide by 1 ranks x 3 accumulation steps; use 6 or 9" in line


def test_a_schedule_that_only_time_ends(refused):  # noqa: F811
    line = refused(trainer={"max_epochs": None, "max_time": "00:01:00:00"})
    assert "WarmupDecay must know the last step" in line and "trainer.max_steps or trainer.max_epochs" in line


def test_a_backbone_that_is_not_there(refused):  # noqa: F811
    line = refused(model={"backbone": {"class_path": "CausalLM", "init_args": {"name": "/nowhere/model"}}})
    assert "backbone '/nowhere/model' cannot be read" in line and "give a local folder" in line


def test_a_task_without_a_head_on_a_classifier(refused, world):  # noqa: F811
    backbone = {"class_path": "Classifier", "init_args": {"name": str(world.backbones["classifier"])}}
    line = refused(model={"backbone": backbone}, data={"tasks": [str(world.tasks["count"])]})
    assert "task 'count' of kind 'generation' has no classifier head: use a CausalLM" in line


def test_a_run_folder_that_is_a_file(world, config, tmp_path, capsys):  # noqa: F811
    file = tmp_path / "file"
    file.write_text("precious")
    line = one_error(capsys, "fit", f"--config={config}", f"--trainer.default_root_dir={file}")
    assert str(file) in line and "cannot be written" in line and "name another folder" in line
    assert file.read_text() == "precious"


@pytest.fixture
def small_disk(tmp_path):
    """Mounts a file system of a given size."""
    mounted = []

    def mount(size):
        folder = tmp_path / "disk"
        folder.mkdir()
        arguments = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        if shutil.which("mount") is None or subprocess.run(arguments, capture_output=True).returncode:
            pytest.skip("may not mount a file system here")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_is_found_before_any_work(config, small_disk, capsys):  # noqa: F811
    disk = small_disk("8k")
    (disk / "filler").write_bytes(b"x" * 8192)
    line = one_error(capsys, "fit", f"--config={config}", f"--trainer.default_root_dir={disk}/run")
    assert "No space left on device" in line and "free the disk" in line
    assert set(files(disk)) == {"filler"}


def test_a_disk_that_fills_up_leaves_the_last_whole_checkpoint(config, small_disk, capsys):  # noqa: F811
    disk = small_disk("300k")  # two checkpoints of 148 kB would fit, with nothing beside them
    line = one_error(capsys, "fit", f"--config={config}", f"--trainer.default_root_dir={disk}/run")
    assert "last.ckpt (No space left on device): free the disk" in line
    found = files(disk / "run")
    assert "checkpoints/best.ckpt" in found
    assert not [name for name in found if name.endswith(".part") or "last.ckpt" in name]
    assert torch.load(disk / "run/checkpoints/best.ckpt", weights_only=True)["global_step"] == 6
