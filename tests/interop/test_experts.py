"""One expert as a folder: written, read back to the bit, refused where it does not fit, and at work in a mixture."""

import json
import shutil
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file

from moe_peft.interop import export as interop
from moe_peft.interop.experts import expert_of, export_expert, read_expert
from moe_peft.interop.install import check, install, read_any
from moe_peft.layers.tensor_train import reconstruct
from moe_peft.methods.expert_rows import expert_rows
from moe_peft.methods.lora import LoRA
from moe_peft.methods.tt_lora import TTLoRA
from tests.methods.tiny_tt import TASKS, alone, blank, experts_come_alive, rows_for, with_tasks
from tests.tiny import build, randomise, tiny_backbone
from tests.tiny_checkpoints import backbones, save, trained  # noqa: F401  (a fixture)

KINDS = ["causal", "seq2seq", "classifier"]
BY_CLS = tiny_backbone("classifier", pooling="cls")


def mixture(kind="causal", seed=7, **options):
    """Three random experts that all act, and a router."""
    return experts_come_alive(blank(kind, **options), rows_for(kind), seed).eval()


def losses(module, kind, task):
    """Each row's loss with every row of one task, so that the model and the task's head are both in it."""
    module.route_by_task = True
    with torch.no_grad():
        return module(with_tasks(rows_for(kind), *[task] * 6))


def own_tensors(module, task):
    """All numbers of one expert by their name in the file."""
    found = {}
    for name, (value, owner) in expert_rows(module).items():
        rows, (slot, _, last) = value.detach()[owner == task], name.rpartition(".")
        found |= {f"head.{last}": rows} if slot == "heads.linear" else {f"{slot}.cores.{last}": rows[0]}
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_an_expert_comes_back_to_the_bit(tmp_path, kind):
    module = mixture(kind)
    export_expert(module, tmp_path / "a", "task1")
    found, expected = load_file(tmp_path / "a" / "expert.safetensors"), own_tensors(module, 1)
    assert found.keys() == expected.keys()
    assert all(value.dtype == torch.float32 and torch.equal(value, expected[name]) for name, value in found.items())
    expert = read_expert(tmp_path / "a")
    assert expert.tensors().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in expert.tensors().items())
    assert expert.spec == TASKS[1] and (expert.alpha, expert.rank, expert.method) == (1.0, 3, "TTLoRAMoE")
    assert expert.layouts == {slot: layer.factors.layout for slot, layer in module.adapted.items()}
    assert expert.fingerprint == module.fingerprint != "" and expert.backbone == module.backbone.describe()
    assert (expert.head is None) == (kind != "classifier")


@pytest.mark.parametrize("kind", KINDS)
def test_every_task_of_a_tt_lora_exports_its_one_adapter_and_its_own_head(tmp_path, kind):
    module = build(TTLoRA, kind, tasks=TASKS, rank=3)
    randomise(module)
    for spec in TASKS:
        export_expert(module, tmp_path / spec.name, spec.name)
    first, *others = (read_expert(tmp_path / spec.name) for spec in TASKS)
    slot, layer = next(iter(module.adapted.items()))
    assert all(torch.equal(one, own) for one, own in zip(first.cores[slot], layer.factors.cores, strict=True))
    for number, other in enumerate(others, 1):
        assert other.task == TASKS[number].name and all(map(torch.equal, first.cores[slot], other.cores[slot]))
        if kind == "classifier":
            assert torch.equal(other.head.weight, module.heads.linear.weight[module.heads.owner == number])
            assert torch.equal(other.head.bias, module.heads.linear.bias[module.heads.owner == number])


@pytest.mark.parametrize("kind", KINDS)
def test_experts_of_separate_runs_answer_in_a_mixture_as_they_did_alone(tmp_path, kind):
    source, target = mixture(kind), mixture(kind, seed=8)
    for task in (2, 0, 1):
        single = alone(source, task).float()
        expected, before = losses(single, kind, 0), [losses(target, kind, other) for other in range(3)]
        assert (before[task] - expected).abs().min() > 1e-4, "it would have to be installed to be equal"
        export_expert(single, tmp_path / str(task), 0)
        install(target, read_any(tmp_path / str(task)), task)
        torch.testing.assert_close(losses(target, kind, task), expected, rtol=0, atol=1e-6)
        assert all(torch.equal(losses(target, kind, other), before[other]) for other in {0, 1, 2} - {task})
    for name, (value, _) in expert_rows(target).items():
        assert torch.equal(value, expert_rows(source)[name][0]), name


@pytest.mark.parametrize("options", [{"alpha": 2.5}, {"rank": 5}, {"alpha": 0.3, "rank": 4}], ids=str)
def test_another_alpha_and_a_higher_rank_leave_the_update_as_it_was(tmp_path, options):
    source, target = mixture("classifier"), mixture("classifier", **options)
    export_expert(source, tmp_path / "a", 1)
    install(target, read_expert(tmp_path / "a"), 1)
    for slot, layer in source.adapted.items():
        there, here = layer.factors, target.adapted[slot].factors
        update = layer.scale * reconstruct([core[1] for core in there.cores], there.layout)
        found = target.adapted[slot].scale * reconstruct([core[1] for core in here.cores], here.layout)
        assert update.abs().max() > 1e-3
        torch.testing.assert_close(found, update, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(losses(target, "classifier", 1), losses(source, "classifier", 1), rtol=0, atol=1e-5)


def test_where_alpha_is_equal_the_cores_are_the_files_own_whatever_the_rank(tmp_path):
    source, target = mixture(), mixture(rank=4)
    export_expert(source, tmp_path / "a", 1)
    install(target, read_expert(tmp_path / "a"), 1)
    for slot, layer in source.adapted.items():
        for own, core in zip(layer.factors.cores, target.adapted[slot].factors.cores, strict=True):
            left, _, right = own.shape[1:]
            assert torch.equal(core[1, :left, :, :right], own[1])
            assert core[1].count_nonzero() == own[1].count_nonzero(), "and zeros beside them"


def test_other_prompts_are_worth_a_note(tmp_path):
    source, target = mixture(), mixture()
    export_expert(source, tmp_path / "a", 1)
    assert install(target, read_expert(tmp_path / "a"), 1).notes == []
    file = tmp_path / "a" / "expert.json"
    about = json.loads(file.read_text())
    about["task"]["template"] = "Say: {text}"
    file.write_text(json.dumps(about))
    assert "it was trained on prompts 'Say: {text}', here they are '{text}'" in str(
        install(target, read_expert(tmp_path / "a"), 1)
    )


# ---- what does not fit -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "target", "message"),
    [
        ("causal", partial(blank, seed=1), r"is of another base: fingerprint \w{16}, here \w{16}; configure its"),
        ("causal", partial(blank, rank=2), "has rank 3, the mixture 2; build it with rank 3"),
        ("causal", partial(blank, alpha=0.0), "where alpha is 0"),
        ("causal", partial(blank, shapes={"32x48": [[2, 16], [16, 3]]}), r"has modes .* \[2, 16\] and \[16, 3\];"),
        ("causal", partial(blank, targets=["q_proj"]), r"adapts .*k_proj, which TTLoRAMoE here does not"),
        ("causal", partial(blank, tasks=[TASKS[0], TASKS[2]]), r"classes \['sport', 'art', 'law'\], task 'task2' of "),
        ("classifier", partial(blank, tasks=[TASKS[0], TASKS[2]]), r"classes \['sport', 'art', 'law'\], task 'task2'"),
        ("classifier", partial(blank, backbone=BY_CLS), "pools by 'mean', .* by 'cls'"),
    ],
)  # fmt: skip
def test_an_expert_that_does_not_fit_is_refused_and_changes_nothing(tmp_path, kind, target, message):
    export_expert(mixture(kind), tmp_path / "a", 1)
    module, expert = target(kind), read_expert(tmp_path / "a")
    before = {name: value.clone() for name, value in module.state_dict().items()}
    for refuse in (check, install):
        with pytest.raises(ValueError, match=f"^expert '.*a'.*{message}") as caught:
            refuse(module, expert, 1)
        assert "\n" not in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_an_expert_that_lacks_a_linear_or_a_head_is_refused(tmp_path):
    export_expert(mixture(targets=["q_proj"]), tmp_path / "a", 1)
    with pytest.raises(ValueError, match="does not adapt .*k_proj, which the mixture does; set targets"):
        check(blank(), read_expert(tmp_path / "a"), 1)
    export_expert(mixture("classifier"), tmp_path / "b", 1)
    with pytest.raises(ValueError, match="has no head for the classes of 'task1'; export it with its head"):
        check(blank("classifier"), read_expert(tmp_path / "b")._replace(head=None), 1)


def test_a_merged_mixture_is_refused(tmp_path):
    module = mixture()
    export_expert(module, tmp_path / "a", 1)
    module.merge("task1")
    with pytest.raises(ValueError, match="cannot be taken into a merged model; call unmerge"):
        install(module, read_expert(tmp_path / "a"), 1)


# ---- files -----------------------------------------------------------------------------------------------------------


def spoil_json(folder, **changes):
    file = folder / "expert.json"
    about = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({name: value for name, value in about.items() if value is not ...}))


def spoil_tensor(folder, change):
    file = folder / "expert.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def first_core(tensors):
    return min(name for name in tensors if "cores" in name)


def put_nan(tensors):
    tensors[first_core(tensors)][0, 0, 0] = float("nan")


def cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda a: shutil.rmtree(a), "a' is no folder; name one that tools/export.py or PEFT wrote, or its id"),
        (lambda a: (a / "expert.json").unlink(), "a' holds neither expert.json nor adapter_config.json"),
        (lambda a: (a / "expert.safetensors").unlink(), "expert.safetensors' is no file"),
        (lambda a: cut(a / "expert.safetensors"), "expert.safetensors' is truncated or no safetensors file"),
        (lambda a: cut(a / "expert.json"), "expert.json' is truncated or no JSON object"),
        (lambda a: (a / "expert.json").write_text("[1]"), "expert.json' is truncated or no JSON object"),
        (lambda a: torch.save({}, a / "expert.safetensors"), "expert.safetensors' is truncated or no safetensors file"),
        (lambda a: spoil_json(a, format=2), r"expert.json' has format 2, which is unknown here \(known: 1\)"),
        (lambda a: spoil_json(a, task=...), r"expert.json' describes no expert \('task'\)"),
        (lambda a: spoil_json(a, alpha=float("inf")), r"expert.json' describes no expert \(alpha inf\)"),
        (lambda a: spoil_json(a, linears=[1]), "expert.json' describes no expert"),
        (lambda a: spoil_json(a, rank=2), "has shape .*, but .* by expert.json; export again"),
        (lambda a: spoil_json(a, pooling=None), r"head.bias has shape \(3,\), but None by expert.json"),
        (lambda a: spoil_tensor(a, put_nan), r"expert.safetensors': \S+\.cores\.0 holds values that are not finite"),
        (lambda a: spoil_tensor(a, lambda t: t.pop(first_core(t))), r"cores\.0 has shape None, but \(1, "),
        (lambda a: spoil_tensor(a, lambda t: t.pop("head.bias")), r"head\.bias has shape None, but \(3,\)"),
        (lambda a: spoil_tensor(a, lambda t: t.pop("head.weight")), r"head\.weight has shape None, but \(3, 0\)"),
    ],
)  # fmt: skip
def test_a_spoilt_folder_gives_one_line(tmp_path, spoil, message):
    export_expert(mixture("classifier"), tmp_path / "a", 1)
    spoil(tmp_path / "a")
    with pytest.raises(ValueError, match=message) as caught:
        read_any(tmp_path / "a")
    assert "\n" not in str(caught.value)


def test_what_is_no_expert_is_not_written(tmp_path):
    module = mixture()
    with pytest.raises(ValueError, match="^task: there is no task 'tune'"):
        export_expert(module, tmp_path / "a", "tune")
    with pytest.raises(ValueError, match="^to: LoRA has no tensor-train experts; use peft or merged$"):
        export_expert(build(LoRA, tasks=TASKS), tmp_path / "a", 1)
    next(iter(module.adapted.values())).factors.cores[2].data[1, 0, 0, 0] = float("inf")
    with pytest.raises(
        ValueError, match=r"^the expert of task 'task1' has values that are not finite in \S+\.cores\.2;"
    ):
        export_expert(module, tmp_path / "a", 1)
    assert not any(tmp_path.iterdir())
    export_expert(module, tmp_path / "a", 0)  # its own numbers are sound


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(backbones, tmp_path):  # noqa: F811
    """A trained TT-LoRA of three tasks."""
    return save(trained(backbones["classifier"], "TTLoRA", "classifier", rank=2), tmp_path / "a.ckpt")


def test_the_command_writes_every_expert_and_proves_it(checkpoint, tmp_path, run_tool):
    status, out, errors = run_tool("export", checkpoint, "--to=expert", "--task=all", f"--out={tmp_path / 'out'}")
    assert status == 0 and not errors and len(out) == 3
    assert all("largest difference 0.0e+00 of numbers up to" in line for line in out)
    assert all(line.endswith("(bit for bit, read back with moe_peft)") for line in out)
    folders = [folder for folder in (tmp_path / "out").iterdir() if folder.is_dir()]
    assert {read_any(folder).task for folder in folders} == {"tone", "sci/topic", "mood"}


def test_a_single_wrong_bit_ends_in_status_1(checkpoint, tmp_path, run_tool, monkeypatch):
    def spoilt(module, folder, task):
        export_expert(module, folder, task)
        spoil_tensor(folder, lambda t: t[first_core(t)][0, 0, 0].mul_(1 + 1e-6))

    monkeypatch.setattr(interop, "export_expert", spoilt)
    status, _, errors = run_tool("export", checkpoint, "--to=expert", "--task=tone", f"--out={tmp_path / 'out'}")
    assert status == 1 and len(errors) == 1 and "the numbers differ from the trained module's" in errors[0]


@pytest.mark.parametrize(("flag", "name"), [("--uniform-rank", "uniform_rank"), ("--text=film", "text")])
def test_options_of_other_exports_are_refused(checkpoint, tmp_path, run_tool, flag, name):
    status, _, errors = run_tool("export", checkpoint, "--to=expert", "--task=all", f"--out={tmp_path / 'out'}", flag)
    assert status == 2 and len(errors) == 1 and errors[0].startswith(f"error: {name}: ")
    assert not (tmp_path / "out").exists()


def test_an_expert_in_memory_is_a_copy(tmp_path):
    module = mixture()
    expert = expert_of(module, tmp_path, 1)
    before = {name: value.clone() for name, value in expert.tensors().items()}
    randomise(module, 9)
    assert all(torch.equal(value, before[name]) for name, value in expert.tensors().items())
