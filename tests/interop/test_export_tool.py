"""The command that exports: what it writes and prints, its statuses, and its one-line errors."""

import json
import math
import re
import subprocess
import sys
from functools import partial

import pytest
from safetensors.torch import load_file, save_file

from moe_peft.interop import export as interop
from tests.conftest import ROOT
from tests.tiny_checkpoints import backbones, save, trained  # noqa: F401  (a fixture)

LINE = r"largest difference (\S+) of outputs up to (\S+) \(float32, 4 rows of random token ids, read back with (\w+)"


@pytest.fixture
def command(run_tool):
    """Runs tools/export.py in this process."""
    return partial(run_tool, "export")


@pytest.fixture
def run_folder(backbones, tmp_path):  # noqa: F811
    """The folder of a MoRE's run with a best checkpoint."""
    save(trained(backbones["causal"], "MoRE", rank=5), tmp_path / "run" / "checkpoints" / "best.ckpt")
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


@pytest.mark.parametrize("spoil", [lambda value: value + 0.05, lambda value: value * math.nan], ids=["moved", "nan"])
@pytest.mark.parametrize("to", ["peft", "merged"])
def test_a_spoilt_export_ends_in_status_1_and_its_files_stay(run_folder, tmp_path, command, monkeypatch, to, spoil):
    own = getattr(interop, f"export_{to}")

    def spoilt(module, folder, task, *options):
        own(module, folder, task, *options)
        if task == "mood":
            file = next(folder.glob("*model.safetensors"))
            tensors = load_file(file)
            name = next(name for name in tensors if name.endswith(("v_proj.lora_B.weight", "v_proj.weight")))
            save_file(tensors | {name: spoil(tensors[name])}, file, metadata={"format": "pt"})

    monkeypatch.setattr(interop, f"export_{to}", spoilt)
    status, out, errors = command(run_folder, f"--to={to}", "--task=all", f"--out={tmp_path / 'out'}")
    assert status == 1 and len(out) == 3
    assert errors == [
        f"error: {tmp_path / 'out' / 'mood'}: the outputs differ from the trained module's by more than 0.001 of the "
        "largest; the files stay, but do not use them"
    ]
    assert all(list((tmp_path / "out" / task).glob("*model.safetensors")) for task in ("tone", "sci_topic", "mood"))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"run": "gone"}, r"'.*gone' is no file"),
        ({"run": "."}, r"holds no checkpoints/best\.ckpt or last\.ckpt"),
        ({"--task": "tune"}, r"task: there is no task 'tune'; use one of tone \(0\), sci/topic \(1\), mood \(2\)"),
        ({"--out": "run"}, r"out: '.*run' exists and is not an empty folder"),
        ({"--backbone": "gone"}, r"backbone 'gone' cannot be read"),
        ({"--text": ""}, "text: an empty text has nothing to compare"),
        ({"--to": "merged", "--uniform-rank": None}, "uniform_rank: merged has no such form; use it with peft"),
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
