"""Merged folders, the comparison that proves an export, and the command that writes both."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from moe_peft.interop.export import export
from moe_peft.interop.merged import export_merged, plain_model
from moe_peft.interop.parity import parity, random_rows, read_back, text_rows
from moe_peft.interop.peft import export_peft
from moe_peft.layers.adapted import AdaptedLinear
from tests.tiny import output, random_batch
from tests.tiny_checkpoints import TASKS, backbones, save, trained  # noqa: F401  (a fixture)

ROOT = Path(__file__).parents[2]
AUTO = {"causal": "AutoModelForCausalLM", "seq2seq": "AutoModelForSeq2SeqLM", "classifier": "AutoModel"}
LINE = r"largest difference (\S+) of outputs up to (\S+) \(float32, 4 rows of random token ids, read back with (\w+)"


@pytest.fixture(scope="module")
def module(backbones):  # noqa: F811
    """A MoRE of three tasks and ranks up to five."""
    return trained(backbones["causal"], "MoRE", rank=5)


def of_task(batch, task):
    return {**batch, "task_id": torch.full_like(batch["task_id"], task)}


def close(one, other, tolerance=1e-5):
    torch.testing.assert_close(one, other, rtol=0, atol=tolerance * max(1.0, other.abs().max().item()))


@torch.no_grad()
@pytest.mark.parametrize("kind", AUTO)
def test_transformers_loads_a_merged_folder_with_equal_outputs(backbones, tmp_path, kind):  # noqa: F811
    with torch.enable_grad():
        module = trained(backbones[kind], "MoRE", kind, rank=5, scaling="code")
    batch = random_batch(kind=kind)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "labels") if name in batch}
    for task, spec in enumerate(TASKS):
        own = output(module, of_task(batch, task))
        export_merged(module, tmp_path / str(task), spec.name)
        model = getattr(transformers, AUTO[kind]).from_pretrained(tmp_path / str(task)).eval()
        found = model(**inputs)
        close(found.logits if kind != "classifier" else found.last_hidden_state, own)
        assert torch.equal(output(module, of_task(batch, task)), own)  # the module is what it was
        tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / str(task))
        assert tokenizer("film 1")["input_ids"] == module.backbone.tokenizer()("film 1")["input_ids"]
        assert (tmp_path / str(task) / "head.json").is_file() == (kind == "classifier")


def test_a_merged_folder_has_the_plain_models_names_only(module, backbones, tmp_path):  # noqa: F811
    export_merged(module, tmp_path / "a", "tone")
    own = load_file(backbones["causal"] / "model.safetensors")
    found = load_file(tmp_path / "a" / "model.safetensors")
    assert found.keys() == own.keys()
    changed = {name.removesuffix(".weight") for name, value in found.items() if not torch.equal(value, own[name])}
    assert changed == set(module.adapted)


def test_a_merged_bases_dtype_stays(backbones, tmp_path):  # noqa: F811
    module = trained(backbones["causal"], "LoRA", dtype="bfloat16")
    export_merged(module, tmp_path / "a", "tone")
    assert {value.dtype for value in load_file(tmp_path / "a" / "model.safetensors").values()} == {torch.bfloat16}


@pytest.mark.parametrize("task", ["tune", "tone"])
def test_a_failed_merged_export_leaves_no_folder_and_no_merge(module, tmp_path, monkeypatch, task):
    def fails(self, folder):
        raise OSError("no space left on device")

    monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained", fails)
    with pytest.raises((ValueError, OSError), match="no task 'tune'|no space left"):
        export_merged(module, tmp_path / "a", task)
    assert not any(tmp_path.iterdir())
    assert not any(layer.merged for layer in module.adapted.values())
    assert all(module.model.get_submodule(slot) is layer for slot, layer in module.adapted.items())


def test_a_merged_module_is_not_exported_as_another_task(module, tmp_path):
    module.merge("mood")
    try:
        with pytest.raises(ValueError, match="^task 'mood' is merged already"):
            export_merged(module, tmp_path / "a", "tone")
        assert module.merged_task == 2 and not any(tmp_path.iterdir())
    finally:
        module.unmerge()


def test_the_plain_model_has_no_adapters_and_the_module_gets_them_back(module):
    with plain_model(module) as model:
        assert not any(isinstance(part, AdaptedLinear) for part in model.modules())
        assert all(type(model.get_submodule(slot)) is nn.Linear for slot in module.adapted)
    assert all(module.model.get_submodule(slot) is layer for slot, layer in module.adapted.items())


def write(module, to, folder, task):
    {"peft": export_peft, "merged": export_merged}[to](module, folder, task)


@pytest.mark.parametrize("to", ["peft", "merged"])
@pytest.mark.parametrize("kind", AUTO)
def test_parity_is_small_for_the_exported_task_and_large_for_another(backbones, tmp_path, kind, to):  # noqa: F811
    module = trained(backbones[kind], "MoRE", kind, rank=5)
    write(module, to, tmp_path / "a", "tone")
    rows = random_rows(module)
    assert parity(module, tmp_path / "a", "tone", rows).difference < 1e-4
    other = parity(module, tmp_path / "a", "mood", rows)
    assert other.difference > 1e-2 and other.reader == {"peft": "peft", "merged": "transformers"}[to]
    assert other.largest > 0.1


@pytest.mark.parametrize("to", ["peft", "merged"])
def test_parity_sees_a_single_changed_tensor_on_disk(module, tmp_path, to):
    write(module, to, tmp_path / "a", "tone")
    file = tmp_path / "a" / {"peft": "adapter_model.safetensors", "merged": "model.safetensors"}[to]
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith(("v_proj.lora_B.weight", "v_proj.weight")))
    save_file(tensors | {name: tensors[name] + 0.05}, file, metadata={"format": "pt"})
    assert parity(module, tmp_path / "a", "tone", random_rows(module)).difference > 1e-3


def test_without_peft_our_own_reader_reads_the_lora_back(module, tmp_path, monkeypatch):
    export_peft(module, tmp_path / "a", "tone")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "peft" else find(name))
    assert read_back(module, tmp_path / "a")[1] == "moe_peft (peft is not installed)"
    rows = random_rows(module)
    assert parity(module, tmp_path / "a", "tone", rows).difference < 1e-4
    assert parity(module, tmp_path / "a", "mood", rows).difference > 1e-2


def test_rows_are_the_users_texts_or_the_same_random_ids(module):
    rows = text_rows(module, ["film 1 was good", "film"])
    assert [row.shape for row in rows] == [(1, 4), (1, 1)]
    random = random_rows(module)
    assert [row.shape for row in random] == [(1, 16)] * 4
    assert all(torch.equal(one, other) for one, other in zip(random, random_rows(module), strict=True))
    with pytest.raises(ValueError, match="^text: an empty text has nothing to compare"):
        text_rows(module, ["film", ""])


@pytest.mark.parametrize("to", ["peft", "merged"])
def test_all_tasks_go_into_a_folder_each(module, tmp_path, to):
    lines = export(module, to, "all", tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["mood", "sci_topic", "tone"]
    assert len(lines) == 3
    for line, spec in zip(lines, TASKS, strict=True):
        found = re.search(LINE, line)
        assert f"task '{spec.name}'" in line and float(found[1]) < 1e-4 < float(found[2])
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs tools/export.py in this process; returns status, lines on stdout, lines on stderr."""
    spec = importlib.util.spec_from_file_location("export_tool", ROOT / "tools" / "export.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)

    def run(*given):
        monkeypatch.setattr(sys, "argv", ["export.py", *map(str, given)])
        capsys.readouterr()
        try:
            tool.main()
            status = 0
        except SystemExit as stop:
            status = stop.code
        streams = capsys.readouterr()
        return status, streams.out.strip().splitlines(), streams.err.strip().splitlines()

    return run


@pytest.fixture
def run_folder(module, tmp_path):
    """A run's folder with a best checkpoint."""
    save(module, tmp_path / "run" / "checkpoints" / "best.ckpt")
    return tmp_path / "run"


def test_the_command_writes_a_lora_and_prints_its_parity(run_folder, tmp_path):
    command = [sys.executable, ROOT / "tools" / "export.py", run_folder, "--to=peft", "--task=tone"]
    done = subprocess.run([*command, f"--out={tmp_path / 'a'}"], capture_output=True, text=True, check=True)
    found = re.search(LINE, done.stdout)
    assert float(found[1]) < 1e-4 and found[3] == "peft"
    assert done.stdout.count("\n") == 1 and json.loads((tmp_path / "a" / "adapter_config.json").read_text())["r"] > 1


def test_the_command_takes_a_checkpoint_a_text_and_the_uniform_form(run_folder, tmp_path, command):
    file = run_folder / "checkpoints" / "best.ckpt"
    given = (file, "--to=peft", "--task=all", "--uniform-rank", "--text=film 1 was good", f"--out={tmp_path / 'a'}")
    status, out, _ = command(*given)
    assert status == 0 and len(out) == 3 and all("1 rows of text" in line for line in out)
    assert json.loads((tmp_path / "a" / "mood" / "adapter_config.json").read_text())["rank_pattern"] == {}


def test_the_command_merges(run_folder, tmp_path, command):
    status, out, _ = command(run_folder, "--to=merged", "--task=mood", f"--out={tmp_path / 'a'}")
    assert status == 0 and "read back with transformers" in out[0]
    assert float(re.search(LINE, out[0])[1]) < 1e-4


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"run": "gone"}, r"'.*gone' is no file"),
        ({"run": "."}, r"holds no checkpoints/best\.ckpt or last\.ckpt"),
        ({"--task": "tune"}, r"task: there is no task 'tune'; use one of tone \(0\), sci/topic \(1\), mood \(2\)"),
        ({"--out": "run"}, r"out: '.*run' exists and is not an empty folder"),
        ({"--backbone": "gone"}, r"backbone 'gone' cannot be read"),
        ({"--text": ""}, "text: an empty text has nothing to compare"),
        ({"--to": "merged", "--uniform-rank": None}, "uniform_rank: a merged export has no ranks; use it with peft"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(run_folder, tmp_path, command, changed, message):
    given = {"--to": "peft", "--task": "tone", "--out": "out"} | changed
    given["--out"] = tmp_path / given["--out"]
    path = tmp_path / given.pop("run", "run")
    flags = [name if value is None else f"{name}={value}" for name, value in given.items()]
    before = sorted(tmp_path.rglob("*"))
    status, out, errors = command(path, *flags)
    assert status == 2 and not out and len(errors) == 1, errors
    assert re.match(f"error: .*{message}", errors[0])
    assert sorted(tmp_path.rglob("*")) == before


def test_the_command_refuses_a_method_that_reads_the_input(backbones, tmp_path, command):  # noqa: F811
    file = save(trained(backbones["causal"], "TRex", r1=2, r2=3), tmp_path / "a.ckpt")
    status, _, errors = command(file, "--to=merged", "--task=all", f"--out={tmp_path / 'out'}")
    assert status == 2 and len(errors) == 1 and "TRex cannot be merged" in errors[0]
    assert not (tmp_path / "out").exists()
