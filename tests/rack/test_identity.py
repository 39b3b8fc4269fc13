"""What makes a fit another one: all that it reads and is made of, and no place."""

import sys

import pytest
import yaml

from moe_peft.rack.identity import weighed
from moe_peft.rack.left_out import left_out
from moe_peft.rack.preparing import prepare
from moe_peft.rack.rows import digest
from moe_peft.rack.settings import merged
from tests.rack.tiny_rack import METHODS, rack
from tests.tiny_runs import world

__all__ = ["rack", "world"]


def hashes(file, more=()):
    """The hash of every row's first fit."""
    return [digest(row, 0, None) for row in prepare(file, more).rows]


@pytest.mark.parametrize(
    ("argument", "same"),
    [
        ("--trainer.log_every_n_steps=7", True),
        ("--data.init_args.num_workers=2", True),
        ("--results.base_row=false", True),
        ("--trainer.gradient_clip_val=1.0", True),
        ("--trainer.num_sanity_val_steps=0", True),
        ("--checkpoint.every_n_train_steps=5", True),
        ("--checkpoint.every_n_minutes=0.5", True),
        ("--trainer.gradient_clip_val=null", False),
        ("--trainer.num_sanity_val_steps=2", False),
        ("--trainer.max_epochs=3", False),
        ("--trainer.precision=bf16-mixed", False),
        ("--checkpoint.monitor=null", False),
        ("--model.init_args.dropout=0.1", False),
    ],
)
def test_what_changes_a_result_makes_another_fit(rack, argument, same):
    file = rack.write(["lora"])
    assert (hashes(file, [argument]) == hashes(file)) is same


def test_the_bytes_of_a_base_count_and_its_place_does_not(rack, world, tmp_path):
    file, base = rack.write(["lora"]), yaml.safe_load(rack.base.read_text())
    before = hashes(file)
    moved = tmp_path / "moved" / "base"
    moved.parent.mkdir()
    base["model"]["init_args"]["backbone"]["init_args"]["name"] = str(moved)
    for name, content in ((own.name, own.read_bytes()) for own in world.backbones["causal"].iterdir()):
        moved.mkdir(exist_ok=True)
        (moved / name).write_bytes(content)
    world.write(rack.base, base)
    assert hashes(file) == before
    weights = next(moved.glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert hashes(file) != before


def test_what_is_no_path_is_a_text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for text in ("a" * 300 + "/b", "~nobody-of-that-name/x", "/", "./", "sst2/dev"):
        assert weighed({"system": text}) == {"system": text}
    (tmp_path / "mine").write_text("1")
    before = weighed({"folder": "mine", "system": "mine"})
    (tmp_path / "mine").write_text("2")
    after = weighed({"folder": "mine", "system": "mine"})
    assert before["folder"] != after["folder"] and before["system"] == after["system"] == "mine"


def test_what_is_added_in_common_stays_with_what_a_row_adds():
    common, own = ({"trainer": {"callbacks+": [name], "max_epochs": name}} for name in ("common", "own"))
    assert merged(common, own) == {"trainer": {"callbacks+": ["common", "own"], "max_epochs": "own"}}


def test_the_code_of_a_users_method_counts(rack, world, tmp_path, monkeypatch):
    code = tmp_path / "my_own_method.py"
    code.write_text("from moe_peft.methods.lora import LoRA\n\n\nclass Mine(LoRA):\n    '''Mine.'''\n")
    monkeypatch.syspath_prepend(tmp_path)
    own = world.write(tmp_path / "mine.yaml", {"model": METHODS["lora"] | {"class_path": "my_own_method.Mine"}})
    file = rack.write([str(own), "lora"])
    before = hashes(file)
    code.write_text(code.read_text() + "    scale = 2\n")
    after = hashes(file)
    assert after[0] != before[0] and after[1] == before[1]
    sys.modules.pop("my_own_method")


def test_a_fit_without_a_task_is_the_same_one_in_another_folder(rack):
    settings = {"shots": 2, "tasks": ["next"]}
    here = prepare(rack.write(["lora"], leave_one_out=settings))
    there = prepare(rack.write(["lora"], leave_one_out=settings, out=str(rack.root / "elsewhere")))
    names = [
        [fit.folder.name for fit in (own.train, own.zero, own.few)]
        for contest in (here, there)
        for own in left_out(contest, contest.rows[0], None)
    ]
    assert names[0] == names[1] and len(set(names[0])) == 3
