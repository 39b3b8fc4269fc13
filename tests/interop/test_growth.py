"""One more expert for a trained mixture: nothing old moves, the new one answers as it did alone, faults are named."""

import re
import shutil
import subprocess
import sys

import pytest
import torch
import yaml

from moe_peft.checkpoint import read_checkpoint
from moe_peft.cli import run
from moe_peft.data.preview import load_data_module
from moe_peft.data.sources import TaskFolder
from moe_peft.interop.experts import export_expert
from moe_peft.interop.growth import add_expert
from moe_peft.interop.peft import export_peft
from moe_peft.methods.lora import LoRA
from moe_peft.methods.tt_lora import TTLoRA
from moe_peft.runs import find_checkpoint, load_module
from tests.methods.ddp_worker import ROOT
from tests.tiny import build, output, random_batch, randomise
from tests.tiny_runs import files, one_error, results, world  # noqa: F401  (a fixture)

LEARNED = {"LinearRouter": ["gate.weight"], "PrototypeRouter": ["sums", "counts"], "RidgeRouter": ["sums", "counts"]}
"""What a router has learned of an expert, by its name."""


def mixture(world, folder, router="LinearRouter", kind="classifier", null=False):  # noqa: F811
    """A trained run of two tasks, the router with it."""
    config = world.config(("tone", "mood"), kind, "TTLoRAMoE")
    config["model"]["init_args"]["router"] = {"class_path": router}
    config["trainer"]["callbacks"] += [{"class_path": "NullExpert", "init_args": {"keep": 0.8}}] if null else []
    world.fit(folder, config)
    return folder


def expert(world, folder, task, kind="classifier", method=TTLoRA, **options):  # noqa: F811
    """A random expert of one task on the mixture's base, exported, and its module."""
    spec, backbone = TaskFolder(str(world.tasks[task])).spec(), load_module(folder).backbone
    module = build(method, tasks=[spec], backbone=backbone, rank=2, **options)
    randomise(module)
    (export_expert if method is TTLoRA else export_peft)(module, folder.parent / f"expert-{task}", 0)
    return folder.parent / f"expert-{task}", module.eval()


@pytest.mark.parametrize("router", LEARNED)
def test_old_experts_heads_and_rows_keep_every_bit_and_the_new_one_answers_as_alone(world, tmp_path, router):  # noqa: F811
    run_folder = mixture(world, tmp_path / "run", router)
    folder, alone = expert(world, run_folder, "stars", alpha=16.0)
    before = read_checkpoint(find_checkpoint(run_folder))["state_dict"]
    untouched = files(run_folder)
    growth = add_expert(run_folder, folder, str(world.tasks["stars"]), tmp_path / "grown")
    after = read_checkpoint(tmp_path / "grown" / "checkpoints" / "best.ckpt")["state_dict"]
    assert files(run_folder) == untouched
    for name, value in before.items():
        kept = torch.equal(after[name][: len(value)] if value.dim() else after[name], value)
        assert kept == (name != "router.gram"), name
    module, batch = load_module(tmp_path / "grown"), random_batch(4, "classifier")
    module.route_by_task = True
    third, first = (batch | {"task_id": torch.full((4,), task)} for task in (2, 0))
    # Alone, one product serves all rows; in a mixture each row has its own: the same but for rounding.
    torch.testing.assert_close(output(module, third), output(alone, first), rtol=0, atol=1e-5)
    old = load_module(run_folder)
    old.route_by_task = True
    assert torch.equal(output(module, first), output(old, first))
    assert [each.task for each in growth.routing] == ["tone", "mood", "stars"]
    assert growth.routing[2].before is None and growth.routing[2].after == growth.routing[2].to_new
    assert all(after[f"router.{name}"][2].abs().sum() > 0 for name in LEARNED[router])


def test_the_grown_run_tests_as_the_report_says(world, tmp_path):  # noqa: F811
    run_folder = mixture(world, tmp_path / "run", "PrototypeRouter")
    folder, _ = expert(world, run_folder, "stars", alpha=16.0)
    growth = add_expert(run_folder, folder, str(world.tasks["stars"]), tmp_path / "grown")
    grown = tmp_path / "grown"
    run(["validate", f"--config={grown}/config.yaml", f"--ckpt_path={grown}/checkpoints/best.ckpt"])
    run(["test", f"--config={grown}/config.yaml", f"--ckpt_path={grown}/checkpoints/best.ckpt"])
    assert results(grown / "results.test-best.json")["rows"]["model"]["tasks"].keys() == {"tone", "mood", "stars"}
    # The report's shares, told again by the router itself on the validation rows.
    data, module = load_data_module(["--config", f"{grown}/config.yaml"]), load_module(grown)
    (batch,) = data.prompts(data.rows("validation"))
    chosen = module.choose(module.scores(batch))
    for task, each in enumerate(growth.routing):
        own = chosen[batch["task_id"] == task]
        assert each.rows == len(own) == 5
        assert each.after == pytest.approx((own == task).float().mean().item())
        assert each.to_new == pytest.approx((own == 2).float().mean().item())


def test_a_threshold_of_the_null_expert_is_settled_anew(world, tmp_path):  # noqa: F811
    run_folder = mixture(world, tmp_path / "run", "PrototypeRouter", null=True)
    folder, _ = expert(world, run_folder, "stars", alpha=16.0)
    add_expert(run_folder, folder, str(world.tasks["stars"]), tmp_path / "grown")
    before, after = load_module(run_folder), load_module(tmp_path / "grown")
    data = load_data_module(["--config", f"{tmp_path}/grown/config.yaml"])
    (batch,) = data.prompts(data.rows("validation"))
    old = batch["task_id"] < 2
    sure = before.router.confidence(before.scores(batch))
    kept = (sure[old] >= before.null_below).double().mean()
    sure, stays = after.router.confidence(after.scores(batch)), after.choose(after.scores(batch)) >= 0
    assert 0 < kept < 1 and stays.double().mean() >= kept
    assert after.null_below == sure[stays].min(), "not the largest threshold that keeps so many"
    assert (sure > after.null_below).double().mean() < kept


def test_a_lora_joins_by_compression_and_says_its_error(world, tmp_path):  # noqa: F811
    run_folder = mixture(world, tmp_path / "run", kind="causal")
    folder, _ = expert(world, run_folder, "next", "causal", LoRA)
    growth = add_expert(run_folder, folder, str(world.tasks["next"]), tmp_path / "grown", rows=8)
    assert 0 < growth.installed.error < 1 and f"relative error {growth.installed.error:.2g}" in str(growth)
    assert re.search(r"tone +n=5 ", str(growth)) and "kept every bit" in str(growth)


def test_faults_are_named_and_leave_nothing(world, tmp_path):  # noqa: F811
    run_folder = mixture(world, tmp_path / "run")
    folder, _ = expert(world, run_folder, "stars", alpha=16.0)
    stars, out = str(world.tasks["stars"]), tmp_path / "grown"
    for arguments, message in (
        ((run_folder, folder, str(world.tasks["tone"]), out), "2 tasks called 'tone'"),
        ((run_folder, tmp_path / "none", stars, out), "is no folder"),
        ((run_folder, folder, stars, run_folder), "exists and is not an empty folder"),
        ((run_folder / "checkpoints" / "best.ckpt", folder, stars, out), "run: .*config.yaml' is no file"),
        ((run_folder, folder, str(world.tasks["next"]), out), "no classifier head|classes"),
        ((run_folder, folder, "{class_path: [", out), "is no YAML"),
        ((run_folder, folder, stars, out, 0), "rows: 0 must be 1 or more"),
    ):
        with pytest.raises(ValueError, match=message):
            add_expert(*arguments)
        assert not [path for path in tmp_path.iterdir() if "grown" in path.name]


def test_a_mixture_whose_router_never_learned_is_refused(world, tmp_path):  # noqa: F811
    run_folder = mixture(world, tmp_path / "run")
    folder, _ = expert(world, run_folder, "stars", alpha=16.0)
    path = run_folder / "checkpoints" / "best.ckpt"
    content = read_checkpoint(path)
    content["state_dict"]["router_trained"].fill_(False)
    torch.save(content, path)
    with pytest.raises(ValueError, match="^run: the router of this mixture was never trained; train it first$"):
        add_expert(run_folder, folder, str(world.tasks["stars"]), tmp_path / "grown")


def test_a_grown_run_grows_again_elsewhere_and_asks_no_outsider(world, tmp_path, capsys):  # noqa: F811
    """The joining task was an outsider before, and the backbone's files lie somewhere else by now."""
    run_folder = mixture(world, tmp_path / "run", "RidgeRouter", "causal")
    config = yaml.safe_load((run_folder / "config.yaml").read_text())
    config["data"]["init_args"]["outside"] = [str(world.tasks["count"])]
    moved = tmp_path / "moved"
    shutil.copytree(world.backbones["causal"], moved)
    config["model"]["init_args"]["backbone"]["init_args"]["name"] = str(tmp_path / "gone")
    (run_folder / "config.yaml").write_text(yaml.safe_dump(config))
    for task, before, after in (("count", "run", "once"), ("next", "once", "twice")):
        folder, _ = expert(world, tmp_path / before, task, "causal", alpha=16.0)
        add_expert(tmp_path / before, folder, str(world.tasks[task]), tmp_path / after, backbone=str(moved))
    run(["test", f"--config={tmp_path}/twice/config.yaml", f"--ckpt_path={tmp_path}/twice/checkpoints/best.ckpt"])
    tested = results(tmp_path / "twice" / "results.test-best.json")["rows"]["model"]["tasks"]
    assert tested.keys() == {"tone", "mood", "count", "next"}
    line = one_error(
        capsys, "fit", f"--config={tmp_path}/twice/config.yaml", f"--ckpt_path={tmp_path}/twice/checkpoints/best.ckpt"
    )
    assert "holds a model only, no training to go on with" in line


def test_the_tool_prints_the_report_or_one_line(world, tmp_path):  # noqa: F811
    run_folder = mixture(world, tmp_path / "run")
    folder, _ = expert(world, run_folder, "stars", alpha=16.0)
    source = yaml.safe_dump(
        {"class_path": "moe_peft.data.sources.TaskFolder", "init_args": {"path": str(world.tasks["stars"])}},
        default_flow_style=True,
    )
    command = [sys.executable, "tools/add_expert.py", str(run_folder), "--expert", str(folder), "--task", source]

    def call(*more):
        return subprocess.run([*command, *more], cwd=ROOT, capture_output=True, text=True, timeout=300)

    done = call("--out", str(tmp_path / "grown"))
    assert done.returncode == 0 and "3 experts; those that were there" in done.stdout, done.stderr
    refused = call("--out", str(tmp_path / "grown"))
    assert refused.returncode == 2 and refused.stderr.startswith("error: out: ") and refused.stderr.count("\n") == 1
