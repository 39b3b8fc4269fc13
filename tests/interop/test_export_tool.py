"""The command that exports: what it writes and prints, its statuses, and its one-line errors."""

import json
import math
import re
import subprocess
import sys
from functools import partial

import huggingface_hub
import pytest
from safetensors.torch import load_file, save_file

from moe_peft.interop import export as interop
from moe_peft.runs import load_module
from tests.conftest import ROOT
from tests.interop.test_hub import Hub
from tests.tiny_checkpoints import TASKS, backbones, save, trained  # noqa: F401  (a fixture)

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
    status, out, errors = command(*given)
    assert status == 0 and len(out) == 3 and all("1 rows of text" in line for line in out) and not errors
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
        if TASKS[task].name == "mood":
            file = next(folder.glob("*model.safetensors"))
            tensors = load_file(file)
            name = next(name for name in tensors if name.endswith(("v_proj.lora_B.weight", "v_proj.weight")))
            save_file(tensors | {name: spoil(tensors[name])}, file, metadata={"format": "pt"})

    monkeypatch.setattr(interop, f"export_{to}", spoilt)
    status, out, errors = command(run_folder, f"--to={to}", "--task=all", f"--out={tmp_path / 'out'}")
    assert status == 1 and len(out) == 3
    assert errors[1:] == [
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
        ({"--to": "adapter"}, "task: an adapter holds all tasks; leave task 'tone' out"),
        ({"--approximate": "task"}, "approximate: a MoRE is exported exactly; leave it out"),
        ({"--push": "a/b/c"}, "push: .*; give owner/name"),
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
    assert "use --approximate task (or cluster) for their mean over real rows" in errors[0]
    assert not (tmp_path / "out").exists()


def test_random_ids_are_compared_on_only_for_want_of_data_and_that_is_said(run_folder, tmp_path, command):
    status, out, errors = command(run_folder, "--to=peft", "--task=tone", f"--out={tmp_path / 'a'}")
    reason = f"'{run_folder / 'config.yaml'}' is no file"
    assert status == 0 and errors == [f"note: compared on random token ids, because {reason}"]
    assert "4 rows of random token ids" in out[0]


@pytest.mark.parametrize("method", ["TRex", "TTLoRAMoE"])
def test_any_method_is_exported_whole_and_read_back_to_the_bit(backbones, tmp_path, command, method):  # noqa: F811
    options = {"r1": 2, "r2": 3} if method == "TRex" else {"rank": 2, "alpha": 1.0}
    module = trained(backbones["causal"], method, **options)
    file = save(module, tmp_path / "run" / "checkpoints" / "best.ckpt")
    status, out, errors = command(file, "--to=adapter", f"--out={tmp_path / 'a'}")
    assert status == 0 and not errors
    assert re.fullmatch(
        r".*/a: largest difference 0\.0e\+00 of numbers up to \S+ \(bit for bit, read back with moe_peft\)", out[0]
    )
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [
        "README.md",
        "adapter_model.safetensors",
        "moe_peft.json",
    ]
    again = load_module(tmp_path / "a").adapter_state()
    own = module.adapter_state()
    assert again.keys() == own.keys() and all(value.equal(own[name]) for name, value in again.items())


@pytest.mark.parametrize("spoil", [lambda value: value + 1e-6, lambda value: value.double()], ids=["moved", "dtype"])
def test_an_adapter_that_differs_by_a_bit_ends_in_status_1(run_folder, tmp_path, command, monkeypatch, spoil):
    own = interop.write_adapter

    def spoilt(module, folder):
        own(module, folder)
        file = folder / "adapter_model.safetensors"
        tensors = load_file(file)
        name = next(name for name in tensors if name.endswith("factors.A"))
        save_file(tensors | {name: spoil(tensors[name])}, file)

    monkeypatch.setattr(interop, "write_adapter", spoilt)
    hub = Hub(monkeypatch)
    status, out, errors = command(run_folder, "--to=adapter", f"--out={tmp_path / 'a'}", "--push=me/it")
    assert status == 1 and len(errors) == 1 and "the numbers differ from the trained module's" in errors[0]
    assert not hub.calls, "what is not faithful is not published"


def test_a_faithful_export_is_pushed_with_its_card(run_folder, tmp_path, command, monkeypatch):
    hub = Hub(monkeypatch)
    status, out, _ = command(run_folder, "--to=adapter", f"--out={tmp_path / 'a'}", "--push=me/it")
    assert status == 0 and out[-1] == "pushed to https://hub.example/me/it"
    assert hub.calls[0] == ("create", "me/it", True, True) and "README.md" in hub.calls[1][2]
    assert "load_adapter(base, 'me/it')" in (tmp_path / "a" / "README.md").read_text()


def test_a_push_that_fails_leaves_the_export(run_folder, tmp_path, command, monkeypatch):
    Hub(monkeypatch, huggingface_hub.errors.OfflineModeIsEnabled("offline"))
    status, out, errors = command(run_folder, "--to=peft", "--task=tone", f"--out={tmp_path / 'a'}", "--push=me/it")
    assert status == 2 and len(out) == 1 and re.match(r"error: push: .* \(offline\); log in", errors[-1])
    assert (tmp_path / "a" / "adapter_config.json").is_file()
