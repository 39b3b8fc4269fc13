"""The command line: quick answers, merged configurations, and one-line errors for a user's mistakes."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

import moe_peft
from moe_peft.cli import run
from moe_peft.messages import arguments_of, one_line
from moe_peft.methods.trex import TRex
from tests.tiny_runs import files, one_error, results, save_backbone, world  # noqa: F401  (a fixture)

ROOT = Path(__file__).parents[1]


def command(*arguments, path=ROOT):
    """Runs `python -m moe_peft` in a process of its own."""
    environment = os.environ | {"PYTHONPATH": str(path), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "moe_peft", *arguments], capture_output=True, text=True, env=environment, cwd=ROOT
    )


def merged(capsys, *arguments):
    """The configuration that `fit` would run with."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        run(["fit", *arguments, "--print_config"])
    assert caught.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)


@pytest.fixture
def config(world, tmp_path):  # noqa: F811
    """A configuration file that runs."""
    return world.write(tmp_path / "config.yaml", world.config())


@pytest.fixture
def refused(world, tmp_path, capsys):  # noqa: F811
    """Runs a fit of a spoiled configuration and returns its one line; nothing may be left in the run folder."""

    def fit(*more, **sections):
        spoiled = world.config()
        for section, arguments in sections.items():
            target = spoiled[section] if section == "trainer" else spoiled[section]["init_args"]
            target.update(arguments)
        file = world.write(tmp_path / "spoiled.yaml", spoiled)
        folder = tmp_path / "run"
        line = one_error(capsys, "fit", f"--config={file}", f"--trainer.default_root_dir={folder}", *more)
        assert not folder.is_dir() or files(folder) == {}
        return line

    return fit


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


# ---- quick answers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("argument, answer", [("--version", moe_peft.__version__), ("--help", "usage: python -m")])
def test_quick_questions_are_answered_in_half_a_second(argument, answer):
    times = []
    for _ in range(3):
        start = time.perf_counter()
        done = command(argument)
        times.append(time.perf_counter() - start)
        assert done.returncode == 0 and answer in done.stdout
    assert min(times) < 0.5


@pytest.mark.slow
def test_a_distribution_of_the_same_import_name_is_named(tmp_path):
    folder = tmp_path / "moe_peft-9.9.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: moe-peft\nVersion: 9.9\n")
    done = command("fit", "--print_config", path=f"{ROOT}{os.pathsep}{tmp_path}")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: the distribution moe-peft 9.9 is installed")
    assert "pip uninstall moe-peft" in done.stderr and done.stderr.count("\n") == 1


# ---- configurations -------------------------------------------------------------------------------------------------


def test_the_printed_configuration_is_its_own_fixed_point(config, tmp_path, capsys):
    printed = merged(capsys, f"--config={config}")
    again = tmp_path / "again.yaml"
    again.write_text(yaml.safe_dump(printed))
    assert merged(capsys, f"--config={again}") == printed
    assert printed["model"]["init_args"]["r2"] == 3 and printed["model"]["init_args"]["gate_slope"] == 100.0


def test_later_files_overlay_earlier_ones(world, config, tmp_path, capsys):  # noqa: F811
    later = world.write(tmp_path / "later.yaml", {"model": {"init_args": {"r1": 5}}, "trainer": {"max_epochs": 7}})
    printed = merged(capsys, f"--config={config}", f"--config={later}")
    assert printed["model"]["init_args"]["r1"] == 5 and printed["model"]["init_args"]["r2"] == 3
    assert printed["trainer"]["max_epochs"] == 7 and printed["trainer"]["accelerator"] == "cpu"


def test_arguments_overlay_files(config, capsys):
    printed = merged(capsys, f"--config={config}", "--model.r1", "3", "--data.batch_size=4", "--model.lr.gates=1e-3")
    assert printed["model"]["init_args"]["r1"] == 3
    assert printed["data"]["init_args"]["batch_size"] == 4
    assert printed["model"]["init_args"]["lr"]["init_args"]["gates"] == 1e-3


def test_classes_are_known_by_their_bare_names(config, capsys):
    sampling = '{"class_path": "EqualRows"}'
    printed = merged(capsys, f"--config={config}", f"--data.sampling={sampling}", "--model.embedder=TfIdf")
    assert printed["model"]["class_path"] == "moe_peft.methods.trex.TRex"
    assert printed["model"]["init_args"]["backbone"]["class_path"] == "moe_peft.backbones.CausalLM"
    assert printed["model"]["init_args"]["embedder"]["class_path"].endswith(".TfIdf")
    assert printed["data"]["class_path"] == "moe_peft.data.module.MultitaskDataModule"
    assert printed["data"]["init_args"]["sampling"]["class_path"] == "moe_peft.data.sampling.EqualRows"
    assert printed["trainer"]["callbacks"][0]["class_path"] == "moe_peft.callbacks.semantic_prior.SemanticPriorFit"


def test_a_runs_configuration_does_not_name_its_loggers_folder(world, tmp_path):  # noqa: F811
    world.fit(tmp_path / "run", None, "--trainer.max_epochs=1", "--trainer.limit_train_batches=1")
    before = files(tmp_path / "run")
    again = ["fit", f"--config={tmp_path}/run/config.yaml", f"--trainer.default_root_dir={tmp_path}/other"]
    run(again)
    assert files(tmp_path / "run") == before
    assert (tmp_path / "other" / "metrics.csv").is_file()


# ---- what a configuration may not say -------------------------------------------------------------------------------

WRONG = {
    "argument": ({"model": {"rnak": 3}}, "model: TRex has no argument 'rnak'; it has r1, r2, mode"),
    "backbone's argument": (
        {"model": {"backbone": {"class_path": "CausalLM", "init_args": {"nme": "x"}}}},
        "model.backbone: CausalLM has no argument 'nme'; it has name, dtype",
    ),
    "type": ({"model": {"r1": "many"}}, "model.r1: 'many' is not accepted; use int"),
    "type in a list": ({"model": {"dropout": [1]}}, "model.dropout: '[1]' is not accepted; use float"),
    "word": ({"model": {"mode": "rank2"}}, "model.mode: 'rank2' is not accepted; use 'mix_and_match', 'rank1'"),
    "value": ({"model": {"r1": 0}}, "r1, r2: 0 and 3, both must be at least 1"),
    "optimizer": (
        {"model": {"optimizer": {"class_path": "torch.optim.Adamm"}}},
        "model.optimizer: module 'torch.optim' has no attribute 'Adamm'",
    ),
    "optimizer's argument": (
        {"model": {"optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lrr": 1}}}},
        "model.optimizer: AdamW has no argument 'lrr'; it has lr, betas",
    ),
    "optimizer's type": (
        {"model": {"optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": "fast"}}}},
        "model.optimizer.lr: 'fast' is not accepted; use float",
    ),
    "nested type": ({"model": {"lr": {"gates": "x"}}}, "model.lr.gates: 'x' is not accepted; use float"),
    "backbone's class": (
        {"model": {"backbone": {"class_path": "CausalLMM"}}},
        "model.backbone: there is no class 'CausalLMM'; use CausalLM, Classifier, Seq2SeqLM",
    ),
    "embedder": (
        {"model": {"embedder": {"class_path": "Tfidff"}}},
        "there is no class 'Tfidff'; use HiddenStates, InputEmbeddings",
    ),
    "data's argument": ({"data": {"batchsize": 3}}, "data: MultitaskDataModule has no argument 'batchsize'; it has"),
    "fraction": ({"data": {"batch_size": 2.5}}, "data.batch_size: '2.5' is not accepted; use int"),
    "sampling": (
        {"data": {"sampling": {"class_path": "Temperatur"}}},
        "data.sampling: there is no class 'Temperatur'; use EqualRows, ExponentialShare",
    ),
    "sampling's argument": (
        {"data": {"sampling": {"class_path": "Temperature", "init_args": {"temp": 1}}}},
        "data.sampling: Temperature has no argument 'temp'; it has temperature",
    ),
    "source's argument": (
        {"data": {"tasks": [{"class_path": "TaskFolder", "init_args": {"pth": "x"}}]}},
        "data.tasks: TaskFolder has no argument 'pth'; it has path",
    ),
    "source's value": (
        {"data": {"tasks": [{"class_path": "TaskFolder", "init_args": {"path": "x", "test_rows": 0}}]}},
        "test_rows=0 leaves no rows; use 1 or more",
    ),
    "trainer's argument": ({"trainer": {"max_epoch": 3}}, "does not accept option 'trainer.max_epoch'"),
    "trainer's type": ({"trainer": {"max_epochs": "two"}}, "trainer.max_epochs: 'two' is not accepted; use int"),
    "callback": (
        {"trainer": {"callbacks": [{"class_path": "SemanticPriorFitt"}]}},
        "trainer.callbacks: there is no class 'SemanticPriorFitt'; use",
    ),
    "callback's argument": (
        {"trainer": {"callbacks": [{"class_path": "SemanticPriorFit", "init_args": {"texts": 2}}]}},
        "trainer.callbacks: SemanticPriorFit has no argument 'texts'; it has max_texts",
    ),
    "precision": ({"trainer": {"precision": "bf16-true"}}, "would store the adapters in half precision"),
    "fsdp": ({"trainer": {"strategy": "fsdp"}}, "'fsdp' is not supported; use ddp"),
    "FSDPStrategy": (
        {"trainer": {"strategy": {"class_path": "lightning.pytorch.strategies.FSDPStrategy"}}},
        "FSDPStrategy' is not supported; use ddp",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_configuration_is_named_with_what_is_allowed(refused, name):
    sections, expected = WRONG[name]
    assert expected in refused(**sections)


def test_an_unknown_method_lists_the_methods(world, tmp_path, capsys):  # noqa: F811
    spoiled = world.config()
    spoiled["model"]["class_path"] = "TRexx"
    file = world.write(tmp_path / "spoiled.yaml", spoiled)
    assert "model: there is no class 'TRexx'; use LoRA, MoRE, TRex" in one_error(capsys, "fit", f"--config={file}")


def test_a_wrong_argument_is_named_like_one_in_a_file(refused):
    assert refused("--model.r1=x").startswith("error: model.r1: 'x' is not accepted; use int")
    assert "TRex has no argument 'r9'" in refused("--model.r9=3")


@pytest.mark.parametrize(
    "text, expected", [(None, "File does not exist"), ("model: [1,\n  :", "line 2, column 3"), ("- 1\n", "- 1")]
)
def test_an_unreadable_file_is_named(tmp_path, capsys, text, expected):
    file = tmp_path / "broken.yaml"
    if text is not None:
        file.write_text(text)
    assert expected in one_error(capsys, "fit", f"--config={file}")


def test_a_configuration_without_sections_says_what_is_missing(world, tmp_path, capsys):  # noqa: F811
    file = world.write(tmp_path / "bare.yaml", {"trainer": {"max_epochs": 1}})
    assert "required: fit.data, fit.model" in one_error(capsys, "fit", f"--config={file}")


def test_an_unknown_command_lists_the_commands(capsys):
    assert "'train' (choose from 'fit', 'validate', 'test', 'predict')" in one_error(capsys, "train")


def test_messages_of_other_kinds_keep_their_text():
    assert one_line("a: 1\n  b") == "a: 1 b"
    assert len(one_line("x" * 5000)) == 600


def test_arguments_of_a_method_are_its_own_and_its_bases():
    names = arguments_of(TRex)
    assert {"r1", "gate_slope", "backbone", "loss_mean"} <= set(names)
    assert not {"self", "common", "tasks"} & set(names)


# ---- what data, model and machine may not be ------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_a_task_folder_without_a_split(world, refused, tmp_path, split):  # noqa: F811
    folder = world.task(tmp_path / "task", "next")
    (folder / f"{split}.jsonl").unlink()
    line = refused(data={"tasks": [str(folder)]})
    assert f"has no {split}.jsonl" in line and str(folder) in line and f"add the {split} split" in line


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_a_label_outside_its_choices(refused, spoiled_task, split):
    line = refused(data={"tasks": [spoiled_task(split, label=9)]})
    assert f"task 'next', {split} row '" in line and "label 9 is outside its 3 choices; use 0..2" in line


def test_an_empty_text(refused, spoiled_task):
    assert "test row '2003': text ' ' is empty; fill it" in refused(data={"tasks": [spoiled_task("test", text=" ")]})


def test_equal_options(refused, spoiled_task):
    line = refused(data={"tasks": [spoiled_task("train", choices=["a", "a", "b"])]})
    assert "train row '3': two options are equal ('a')" in line and "equal_options: drop" in line


def test_a_template_that_names_a_missing_column(refused, world):  # noqa: F811
    source = {"class_path": "TaskFolder", "init_args": {"path": str(world.tasks["next"]), "template": "{question}"}}
    assert "the template names column 'question', which the row lacks; use one of" in refused(data={"tasks": [source]})


def test_an_answer_longer_than_the_limit(refused, world):  # noqa: F811
    line = refused(data={"tasks": [str(world.tasks["count"])], "max_length": 10})
    assert "rows have an answer that leaves no room" in line and "max_length=10" in line


def test_more_clusters_than_texts(refused):
    line = refused(model={"clusters": 1000})
    assert "clusters is 1000, but the 48 training texts hold only 48 different ones: lower clusters" in line


def test_a_target_that_matches_nothing(refused):
    line = refused(model={"targets": ["q_prj"]})
    assert "targets: ['q_prj'] matches no linear; this model has down_proj" in line


def test_a_method_with_a_prior_that_nothing_fits(refused):
    assert "the semantic prior is not fitted: add the SemanticPriorFit callback" in refused(trainer={"callbacks": []})


def test_a_batch_size_that_does_not_divide(refused):
    line = refused(trainer={"accumulate_grad_batches": 3})
    assert "batch_size=8 (global) must divide by 1 ranks x 3 accumulation steps; use 6 or 9" in line


def test_a_backbone_that_is_not_there(refused):
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


def test_an_existing_run_is_refused_and_left_alone(fitted, config, capsys):
    before = files(fitted)
    line = one_error(capsys, "fit", f"--config={config}", f"--trainer.default_root_dir={fitted}")
    assert "already holds a run; name another folder, or resume it with --ckpt_path last" in line
    assert files(fitted) == before


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


def test_a_full_disk_is_found_before_any_work(config, small_disk, capsys):
    disk = small_disk("8k")
    (disk / "filler").write_bytes(b"x" * 8192)
    line = one_error(capsys, "fit", f"--config={config}", f"--trainer.default_root_dir={disk}/run")
    assert "No space left on device" in line and "free the disk" in line
    assert set(files(disk)) == {"filler"}


def test_a_disk_that_fills_up_leaves_the_last_whole_checkpoint(config, small_disk, capsys):
    disk = small_disk("300k")  # two checkpoints of 148 kB would fit, with nothing beside them
    line = one_error(capsys, "fit", f"--config={config}", f"--trainer.default_root_dir={disk}/run")
    assert "last.ckpt (No space left on device): free the disk" in line
    found = files(disk / "run")
    assert "checkpoints/best.ckpt" in found
    assert not [name for name in found if name.endswith(".part") or "last.ckpt" in name]
    assert torch.load(disk / "run/checkpoints/best.ckpt", weights_only=True)["global_step"] == 6


# ---- checkpoints ----------------------------------------------------------------------------------------------------


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


def test_a_learning_rate_that_a_resumed_fit_would_drop(fitted, config, capsys):
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
