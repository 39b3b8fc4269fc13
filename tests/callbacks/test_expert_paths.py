"""Experts of separate runs in place of stage one: collected in any order, frozen to the bit, or refused in a line."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from moe_peft.backbones import CausalLM
from moe_peft.callbacks.checkpoints import AdapterCheckpoint
from moe_peft.callbacks.freeze_then_route import EXPERTS, FreezeThenRoute
from moe_peft.data.tasks import TaskSpec
from moe_peft.interop.experts import export_expert, read_expert
from moe_peft.interop.peft import export_peft
from moe_peft.layers.expert_router import LinearRouter
from moe_peft.layers.tensor_train import fold
from moe_peft.methods.expert_rows import expert_rows
from moe_peft.methods.lora import LoRA
from moe_peft.methods.tt_lora import TTLoRA
from moe_peft.optim import WarmupDecay
from tests.callbacks.tiny_stages import fit, moved, scripted, weights
from tests.methods.tiny_tt import TASKS
from tests.tiny import build, randomise
from tests.tiny_runs import one_error, results, world  # noqa: F401  (a fixture)


def exports(folder, kind="causal", **options):
    """The folders of three runs' experts, one of each task, not in the tasks' order."""
    folders = []
    for task in (2, 0, 1):
        module = build(TTLoRA, kind, tasks=[TASKS[task]], **{"rank": 2, "alpha": 4.0} | options)
        randomise(module, seed=task)
        folders.append(str(folder / f"run{task}"))
        export_expert(module, folders[-1], 0)
    return folders


def lora(folder, kind="causal"):
    """The folder of a LoRA of the second task."""
    module = build(LoRA, kind, tasks=[TASKS[1]], rank=2)
    randomise(module)
    export_peft(module, folder, 0)
    return str(folder)


def own(module, task):
    """One expert's numbers, by name."""
    return {name: value.detach()[owner == task] for name, (value, owner) in expert_rows(module).items()}


@pytest.mark.parametrize("kind", ["causal", "classifier"])
def test_experts_come_from_their_files_stay_to_the_bit_and_the_router_learns(tmp_path, kind):
    folders = exports(tmp_path / "in", kind)
    module = scripted(kind)
    _, watch = fit(module, tmp_path, FreezeThenRoute(expert_paths=folders), epochs=2)
    assert watch.closed == [EXPERTS] * 8 and watch.learned == [{"routers"}] * 8
    assert moved(watch.after[0], watch.after[-1]) == {"routers"}
    for task, folder in zip((2, 0, 1), folders, strict=True):
        expert, here = read_expert(folder), own(module, task)
        for slot, cores in expert.cores.items():
            assert all(torch.equal(here[f"{slot}.{at}"][0], core) for at, core in enumerate(cores))
        if kind == "classifier":
            assert torch.equal(here["heads.linear.weight"], expert.head.weight)
            assert torch.equal(here["heads.linear.bias"], expert.head.bias)


def test_a_lora_may_be_among_them_and_what_was_lost_is_said(tmp_path, caplog):
    second, third, _ = exports(tmp_path / "in")
    caplog.set_level("INFO")
    fit(
        module := scripted(), tmp_path, FreezeThenRoute(expert_paths=[lora(tmp_path / "lora"), second, third]), epochs=1
    )
    lines = [record.getMessage() for record in caplog.records if record.getMessage().startswith("expert of")]
    assert len(lines) == 3 and lines[0] == f"expert of task0: from '{third}'"
    assert lines[1].startswith(f"expert of task1: from '{tmp_path / 'lora'}', compressed with relative error 0.")
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    errors = []
    for slot, layer in module.adapted.items():
        given = (tensors[f"base_model.model.{slot}.lora_{half}.weight"] for half in "BA")
        a, b = fold([core.detach()[1] for core in layer.factors.cores], layer.factors.layout)
        dense = next(given) @ next(given) * 8  # alpha 16 / rank 2
        errors.append(((4.0 * b @ a - dense).norm() / dense.norm()).item())
    assert f"(at most {max(errors):.2g}, " in lines[1] and 0 < max(errors) < 1


def test_the_router_has_the_whole_schedule(tmp_path):
    module = scripted(scheduler=lambda optimizer: WarmupDecay(optimizer, warmup=0, decay="linear"))
    _, watch = fit(module, tmp_path, FreezeThenRoute(expert_paths=exports(tmp_path / "in")), epochs=2)
    assert [step["routers"] for step in watch.rates] == pytest.approx([1e-3 * (1 - step / 8) for step in range(8)])
    assert {step["adapters"] for step in watch.rates} == {0.0}


class Saving(AdapterCheckpoint):
    """Keeps the checkpoint of every validation."""

    def on_validation_end(self, trainer, pl_module):
        super().on_validation_end(trainer, pl_module)
        trainer.save_checkpoint(f"{trainer.default_root_dir}/{trainer.global_step}.ckpt")


def test_a_resumed_fit_needs_no_folders(tmp_path):
    folders = exports(tmp_path / "in", "classifier")
    module = scripted("classifier", router=LinearRouter(noise=False))
    _, watch = fit(module, tmp_path / "whole", FreezeThenRoute(expert_paths=folders), Saving(), epochs=3)
    shutil.rmtree(tmp_path / "in")
    again, resume = scripted("classifier", router=LinearRouter(noise=False)), tmp_path / "whole" / "4.ckpt"
    _, resumed = fit(again, tmp_path / "again", FreezeThenRoute(expert_paths=folders), epochs=3, resume=resume)
    assert len(resumed.losses) == 8 and resumed.losses == watch.losses[4:]
    assert moved(weights(again), weights(module)) == set()


def test_a_stage_one_that_was_begun_is_not_ended_by_other_experts(tmp_path):
    fit(scripted(), tmp_path / "begun", FreezeThenRoute(8), Saving(), epochs=3)
    with pytest.raises(
        ValueError, match="^FreezeThenRoute: expert_paths cannot end a stage one that was begun; resume"
    ):
        resume = tmp_path / "begun" / "4.ckpt"
        fit(scripted(), tmp_path, FreezeThenRoute(expert_paths=exports(tmp_path / "in")), epochs=3, resume=resume)


# ---- refusals --------------------------------------------------------------------------------------------------------


def put_nan(folder):
    tensors = load_file(f"{folder}/expert.safetensors")
    tensors[min(tensors)][0, 0, 0] = float("nan")
    save_file(tensors, f"{folder}/expert.safetensors")


def rename(folder, name):
    about = json.loads((folder / "expert.json").read_text())
    about["task"]["name"] = name
    (folder / "expert.json").write_text(json.dumps(about))


REFUSED = {
    "two of a name": (lambda a: rename(a / "run2", "task0"), "'.*run2' and '.*run0' are both of 'task0'; drop one"),
    "of no task": (lambda a: rename(a / "run2", "mood"), r"'.*run2' is of task 'mood', which the run lacks \(task0, "),
    "no such path": (lambda a: shutil.rmtree(a / "run1"), "'.*run1' is no folder; name one that tools/export.py"),
    "nan": (
        lambda a: put_nan(a / "run1"),
        r"'.*run1/expert\.safetensors': \S+\.down_proj\.cores\.0 holds values",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_folders_that_cannot_be_collected_are_refused(tmp_path, case):
    spoil, message = REFUSED[case]
    folders = exports(tmp_path)
    spoil(tmp_path)
    refused(tmp_path, folders, message)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": 1}, "expert '.*run0' is of another base: fingerprint"),
        ({"shapes": {"32x48": [[2, 16], [16, 3]]}}, r"expert '.*run0': \S+gate_proj has modes \[2, 16\] and \[16, 3\]"),
        ({"rank": 3}, "expert '.*run0' has rank 3, the mixture 2; build it with rank 3"),
    ],
    ids=["base", "layout", "rank"],
)  # fmt: skip
def test_experts_that_do_not_fit_are_refused(tmp_path, options, message):
    refused(tmp_path, exports(tmp_path, **options), message)


def test_a_task_without_an_expert_is_refused(tmp_path):
    refused(
        tmp_path, exports(tmp_path)[:1], "no trained expert of task0, task1; name its export too, or leave the task"
    )


def refused(folder, folders, message):
    """No step is made."""
    module = scripted()
    steps = []
    module.on_train_batch_start = lambda *_: steps.append(0)
    with pytest.raises(ValueError, match=f"^FreezeThenRoute: expert_paths: {message}") as caught:
        fit(module, folder, FreezeThenRoute(expert_paths=folders))
    assert "\n" not in str(caught.value) and not steps


@pytest.mark.parametrize("more", [{"experts_steps": 3}, {"experts_epochs": 1}, {"patience": 2}], ids=str)
def test_there_is_no_stage_one_to_be_measured(more):
    with pytest.raises(
        ValueError, match="^FreezeThenRoute: (give experts_steps or experts_epochs, .*three|patience 2 ends)"
    ):
        FreezeThenRoute(expert_paths=["a"], **more)


# ---- the command line ------------------------------------------------------------------------------------------------


def test_the_command_trains_a_router_for_given_experts_and_tests_it(world, tmp_path, capsys):  # noqa: F811
    tone = TaskSpec("tone", "classification", "accuracy", "{text} :", ("negative", "positive"))
    following = TaskSpec("next", "multiple_choice", "accuracy", "{text} :")
    paths, backbone = [], CausalLM(str(world.backbones["causal"]), dtype="float32")
    for task in (following, tone):
        module = build(TTLoRA, tasks=[task], backbone=backbone, rank=2)
        randomise(module)
        paths.append(str(tmp_path / "experts" / task.name))
        export_expert(module, paths[-1], 0)
    config = world.config(method="TTLoRAMoE")
    config["trainer"]["max_epochs"] = 1
    config["trainer"]["callbacks"][0]["init_args"] = {"expert_paths": paths}
    world.fit(tmp_path / "run", config)
    assert results(tmp_path / "run/results.json")["rows"]["model"]["tasks"].keys() == {"tone", "next"}
    state = torch.load(tmp_path / "run/checkpoints/best.ckpt", weights_only=True)["state_dict"]
    assert state["router_trained"]
    for number, path in enumerate(reversed(paths)):
        for name, value in load_file(f"{path}/expert.safetensors").items():
            slot, _, at = name.rpartition(".cores.")
            assert torch.equal(state[f"model.{slot}.factors.cores.{at}"][number], value)
    config["trainer"]["callbacks"][0]["init_args"] = {"expert_paths": paths[:1]}
    file = world.write(tmp_path / "wrong.yaml", config)
    line = one_error(capsys, "fit", f"--config={file}", f"--trainer.default_root_dir={tmp_path}/wrong")
    assert "FreezeThenRoute: expert_paths: no trained expert of tone" in line
