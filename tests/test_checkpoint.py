"""What a checkpoint says of itself, and what is refused."""

import os

import pytest
import torch

from moe_peft.checkpoint import check_adapter_state, conflicts, describe, read_checkpoint, refuse_foreign
from moe_peft.methods.lora import LoRA
from moe_peft.methods.trex import TRex
from tests.tiny import build, randomise


@pytest.fixture
def module():
    """A LoRA on a tiny base."""
    return build(LoRA, rank=2)


def saved(module, path):
    """Writes a module's checkpoint as a Trainer would."""
    checkpoint = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, path)
    return path


def test_description_is_plain_and_identifies_method_base_and_tasks(module):
    found = describe(module)
    assert found["method"] == "LoRA" and found["tasks"] == ["tone", "topic"]
    assert len(found["fingerprint"]) == 16 and found["embedder"] == ""
    assert describe(build(LoRA, rank=2)) == found
    assert describe(build(LoRA, rank=2, seed=1))["fingerprint"] != found["fingerprint"]
    assert describe(build(TRex, r1=2, r2=3))["embedder"] != ""


def test_a_checkpoint_is_read_with_plain_types_only_and_restores_the_adapters(module, tmp_path):
    randomise(module)
    checkpoint = read_checkpoint(saved(module, tmp_path / "a.ckpt"))
    other = build(LoRA, rank=2)
    other.on_load_checkpoint(checkpoint)
    other.load_state_dict(checkpoint["state_dict"])
    for name, value in module.adapter_state().items():
        assert torch.equal(other.adapter_state()[name], value)
    assert checkpoint["state_dict"].keys() == module.adapter_state().keys()


def test_a_checkpoint_is_read_onto_the_cpu_by_its_path_or_name(module, tmp_path):
    path = saved(module, tmp_path / "a.ckpt")
    assert read_checkpoint(str(path))["moe_peft"] == read_checkpoint(path)["moe_peft"] == describe(module)


class Danger:
    """Would run code where a pickle is loaded without care."""

    def __reduce__(self):
        return (os.mkdir, ("danger",))


@pytest.mark.parametrize("content", [b"", b"hello", "half", "danger"])
def test_a_file_that_is_no_whole_checkpoint_is_refused(module, tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    path = saved(module, tmp_path / "a.ckpt")
    if content == "danger":
        torch.save({"moe_peft": {}, "state_dict": Danger()}, path)
    else:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2] if content == "half" else content)
    with pytest.raises(ValueError, match=r"a\.ckpt' is truncated or no checkpoint: give a whole file") as caught:
        read_checkpoint(path)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "danger").exists()


@pytest.mark.parametrize("content", [{"state_dict": {}}, [1, 2]])
def test_a_checkpoint_of_another_program_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match="is no moe_peft checkpoint: give a file written by"):
        read_checkpoint(tmp_path / "a.ckpt")


@pytest.mark.parametrize("name", ["missing.ckpt", "."])
def test_a_missing_file_or_a_folder_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match="is no file; give a checkpoint"):
        read_checkpoint(tmp_path / name)


@pytest.mark.parametrize(
    "name, value, fix",
    [
        ("format", 99, "use the version of moe_peft that wrote it"),
        ("method", "TRex", "configure that method"),
        ("fingerprint", "0" * 16, "configure its backbone, .*tiny-causal"),
        ("embedder", "x", "configure the embedder"),
        ("tasks", ["tone"], "configure the same tasks in the same order"),
    ],
)
def test_each_difference_of_identity_is_refused_with_its_fix(module, name, value, fix):
    here = describe(module)
    refuse_foreign({"moe_peft": here}, here)
    with pytest.raises(ValueError, match=f"checkpoint of another {name}: .*{fix}") as caught:
        refuse_foreign({"moe_peft": here | {name: value}}, here)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_without_identity_is_refused(module):
    with pytest.raises(ValueError, match="not written by moe_peft"):
        refuse_foreign({"state_dict": {}}, describe(module))


def test_other_configurations_do_not_make_a_checkpoint_foreign(module):
    here = describe(module)
    refuse_foreign({"moe_peft": here | {"config": {"class_path": "x"}, "backbone": "elsewhere"}}, here)


def test_equal_adapter_states_pass(module):
    check_adapter_state(module.adapter_state(), dict(reversed(module.adapter_state().items())))


def test_a_missing_tensor_is_named(module):
    own = module.adapter_state()
    first = min(own)
    with pytest.raises(ValueError, match=f"lacks 1 tensors, first '{first}': it was made with other targets"):
        check_adapter_state(own, {name: value for name, value in own.items() if name != first})


def test_an_unexpected_tensor_is_named(module):
    own = module.adapter_state()
    with pytest.raises(ValueError, match="has unexpected 1 tensors, first 'model.extra'"):
        check_adapter_state(own, own | {"model.extra": torch.zeros(1)})


def test_another_rank_is_named_with_both_shapes(module):
    other = build(LoRA, rank=3).adapter_state()
    with pytest.raises(ValueError, match=r"has shape \[3, 48\], this run's \[2, 48\]: another rank"):
        check_adapter_state(module.adapter_state(), other)


def test_another_number_of_clusters_is_refused():
    few, many = (build(TRex, r1=2, r2=3, clusters=clusters) for clusters in (4, 6))
    with pytest.raises(ValueError, match="lacks|has unexpected|another rank, number of experts or clusters"):
        few.load_state_dict(many.adapter_state())


def test_loading_checks_whatever_strict_says(module):
    state = module.adapter_state()
    state.pop(min(state))
    with pytest.raises(ValueError, match="lacks 1 tensors"):
        module.load_state_dict(state, strict=False)


def test_conflicts_lists_every_difference_with_its_dotted_name():
    there = {"class_path": "A", "init_args": {"r1": 2, "r2": 3, "lr": {"gates": None}}}
    here = {"class_path": "A", "init_args": {"r1": 4, "r2": 3, "lr": {"gates": 0.5}}}
    assert conflicts(there, here) == [
        "init_args.lr.gates is 0.5 here and None in the checkpoint",
        "init_args.r1 is 4 here and 2 in the checkpoint",
    ]


def test_conflicts_sees_arguments_that_only_the_checkpoint_has():
    assert conflicts({"a": 1}, {"a": 1, "b": 2}) == []  # an argument younger than the checkpoint
    assert conflicts({"a": 1, "b": 2}, {"a": 1}) == ["b is None here and 2 in the checkpoint"]
    assert conflicts({"a": {"b": 1}}, {"a": 1}) == ["a is 1 here and {'b': 1} in the checkpoint"]


def test_equal_configurations_have_no_conflict():
    assert conflicts({"a": [1, {"b": 2}]}, {"a": [1, {"b": 2}]}) == []
