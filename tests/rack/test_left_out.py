"""Leave one task out: trained on the others, tested on it as it is and after some examples."""

import json
from pathlib import Path

import pytest
import torch

from moe_peft.rack.command import compare
from moe_peft.rack.left_out import able, left_out
from moe_peft.rack.preparing import prepare
from tests.rack.tiny_rack import in_process, rack
from tests.tiny_runs import world

__all__ = ["in_process", "rack", "world"]


def test_a_task_is_left_out_and_then_shown(rack, in_process, world):
    more = {"class_path": "MoRE", "init_args": {"rank": 2, "optimizer": rate()}}
    moe = {"class_path": "MOELoRA", "init_args": {"experts": 2, "rank": 1, "optimizer": rate()}}
    own = [world.write(rack.root / f"{name}.yaml", {"model": model}) for name, model in (("more", more), ("moe", moe))]
    settings = {"shots": 2, "tasks": ["next"], "overlay": {"trainer": {"max_epochs": 1}}}
    file = rack.write(["lora", "trex", *map(str, own)], leave_one_out=settings)
    compare(prepare(file))
    content = json.loads((rack.out / "left-out.json").read_text())
    assert content["cannot"] == {"moe": "it routes by task alone, and knows no other task's weights"}
    assert [(line["tag"], line["shots"]) for line in content["rows"]] == [
        ("lora", 0),
        ("lora", 2),
        ("trex", 0),
        ("trex", 2),
        ("more", 0),
        ("more", 2),
    ]
    (trained,) = rack.out.glob("left-out/lora/next-without-*/checkpoints/best.ckpt")
    before = torch.load(trained, weights_only=True)
    assert before["moe_peft"]["tasks"] == ["tone"]
    (few,) = rack.out.glob("left-out/lora/next-2-shot-*/checkpoints/best.ckpt")
    after = torch.load(few, weights_only=True)
    assert after["moe_peft"]["tasks"] == ["next"] and after["global_step"] < before["global_step"]
    base = answers(next(file for file in (rack.root / "cache").iterdir() if '"next/' in file.read_text()))
    for line in content["rows"]:
        if line["shots"] == 0:  # what was learnt without it has come over: new adapters would change nothing
            zero = answers(Path(line["run"]) / "predictions.jsonl")
            assert zero.keys() == base.keys() and any(zero[row] != base[row] for row in zero)
    commands = len(in_process.commands)
    assert commands == 4 + 3 * 3
    compare(prepare(file))
    assert len(in_process.commands) == commands
    (about,) = rack.out.glob("left-out/lora/next-2-shot-*/rack.json")
    diverged = json.loads(about.read_text()) | {"finished": False, "failed": "the loss is not finite"}
    about.write_text(json.dumps(diverged))
    compare(prepare(file))
    content = json.loads((rack.out / "left-out.json").read_text())
    assert content["diverged"] == ["lora, next-2-shot"] and len(content["rows"]) == 5
    assert "- lora, next-2-shot: diverged." in (rack.out / "left-out.md").read_text()


def test_experts_of_tasks_serve_no_other_task(rack, world):
    model = {"class_path": "TTLoRAMoE", "init_args": {"rank": 2, "optimizer": rate()}}
    own = world.write(rack.root / "tt.yaml", {"model": model})
    contest = prepare(rack.write(["lora", str(own)], leave_one_out={"shots": 2}))
    assert [row.tag for row in able(contest)] == ["lora"]


def test_the_command_line_cannot_bring_the_task_back(rack, world):
    tasks = f"--data.init_args.tasks=[{world.tasks['tone']}, {world.tasks['next']}]"
    contest = prepare(rack.write(["lora"], leave_one_out={"tasks": ["next"]}), [tasks, "--trainer.max_steps=5"])
    (own,) = left_out(contest, contest.rows[0], None)
    assert own.train.row.tasks == ["tone"] and own.few.row.tasks == ["next"]
    assert own.zero.row.identity["trainer"]["max_steps"] == 0


def answers(file):
    """The scores of the rows of the task that was left out."""
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    return {line["row_id"]: line["scores"] for line in lines if line.get("row_id", "").startswith("next/")}


def rate():
    """An optimizer."""
    return {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"shots": 0}, "leave_one_out.shots: 0 is below 1"),
        ({"overlay": {"trainre": {}}}, "leave_one_out.overlay: 'trainre' is no section of a configuration"),
    ],
)
def test_a_mistake_is_one_line(rack, run_tool, settings, expected):
    status, _, errors = run_tool("compare", rack.write(["lora"], leave_one_out=settings))
    assert status == 2 and len(errors) == 1 and expected in errors[0]
    assert not rack.out.exists()
