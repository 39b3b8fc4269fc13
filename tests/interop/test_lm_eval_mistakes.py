"""What lm-eval may not be asked: one line, status 2, nothing written."""

import importlib.util

import pytest

from tests.data.toys import write_task
from tests.interop.tiny_lm_eval import METHODS, backbones, folders, offline, run, tasks, write_tasks
from tests.tiny_checkpoints import save, trained
from tests.tiny_runs import text_rows

FIXTURES = (backbones, folders, offline, tasks)


@pytest.fixture(scope="session")
def adapters(backbones, tmp_path_factory):
    """Checkpoints by method; a classifier's too."""
    root = tmp_path_factory.mktemp("adapters")
    kinds = {"LoRA": "causal", "MoRE": "causal", "classifier": "classifier"}
    return {
        name: save(
            trained(backbones[kind], name if name in METHODS else "LoRA", kind, **METHODS.get(name, {})),
            root / f"{name}.ckpt",
        )
        for name, kind in kinds.items()
    }


@pytest.fixture
def refused(monkeypatch, capsys):
    """Runs a command that must end with status 2 and one line; returns that line."""

    def fail(*arguments):
        with pytest.raises(SystemExit) as stop:
            run(monkeypatch, *arguments)
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert stop.value.code == 2 and len(lines) == 1, lines
        return lines[0]

    return fail


@pytest.mark.parametrize(
    ("arguments", "task", "message"),
    [
        ("adapter=gone", "tone", "'gone' is no file"),
        ("adapter={root}", "tone", "holds no checkpoints/best.ckpt or last.ckpt"),
        ("base=x", "tone", "adapter is missing; give a run, a checkpoint or an exported adapter"),
        ("adapter={LoRA},pretrained=x", "tone", "there is no argument 'pretrained'; use adapter, base, dtype"),
        ("adapter={LoRA},base=gone", "tone", "backbone 'gone' cannot be read"),
        ("adapter={LoRA},dtype=int8", "tone", "model.backbone.dtype: 'int8' is not accepted; use 'auto', 'float32'"),
        ("adapter={LoRA},routing=oracle", "tone", "routing: a LoRA has no such argument; leave it out"),
        (
            "adapter={MoRE},tasks=mine:tune",
            "tone",
            "tasks: 'mine:tune' is no LM_EVAL_TASK:TASK with a task of tone, sci",
        ),
        ("adapter={MoRE},tasks=mine", "tone", "tasks: 'mine' is no LM_EVAL_TASK:TASK"),
        ("adapter={LoRA},bos=some", "tone", "bos: 'some' is none of auto, always and never"),
        ("adapter={LoRA} --batch_size 0", "tone", "batch_size: '0' is no number of 1 or more"),
        ("adapter={LoRA},max_length=long", "tone", "max_length: 'long' is no number of 1 or more"),
        ("adapter={LoRA},max_length=1", "tone", "max_length=1 must lie between 2"),
        ("adapter={LoRA},max_length=2", "tone", "leaves no room for a prompt within max_length=2"),
        ("adapter={LoRA},unknown_task=mean", "tone", "unknown_task: a LoRA has no such argument"),
        ("adapter={classifier}", "tone", "answers by the heads of a classifier, which lm-eval cannot ask"),
        ("adapter={MoRE}", "topic", "task 'topic' is none of the adapter's (tone, sci/topic, mood)"),
        ("adapter={LoRA}", "gone", "Tasks not found: gone"),
    ],
)
def test_a_mistake_is_one_line(adapters, tasks, tmp_path, refused, arguments, task, message):
    given = arguments.format(root=tmp_path, **adapters).split()
    asked = ("--tasks", tasks.get(task, task), "-o", tmp_path / "out")
    assert message in refused("run", "--model", "moe_peft", "--model_args", *given, *asked)
    assert not list(tmp_path.iterdir())


def test_no_room_beside_what_is_to_be_written(adapters, tmp_path, refused):
    write_tasks(
        [write_task(tmp_path / "count", {"test": text_rows(3)}, "generation", metric="exact_match")], tmp_path / "y"
    )
    given = ["--model_args", f"adapter={adapters['LoRA']},max_length=20", "--gen_kwargs", "max_gen_toks=20"]
    line = refused("run", "--model", "moe_peft", *given, "--tasks", tmp_path / "y" / "count.yaml")
    assert "max_gen_toks: 20 new tokens leave no room for a prompt in max_length=20" in line


def test_without_lm_eval_the_command_says_what_to_install(monkeypatch, refused):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "lm_eval" else find(name))
    assert refused("run") == "error: lm-eval is not installed: pip install 'lightning-moe-peft[lm-eval]'"
