"""Merged folders, and the comparison that proves an export."""

import importlib.util
import json
import math

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

import moe_peft.backbones
from moe_peft.backbones import CausalLM
from moe_peft.interop.export import export, unfaithful
from moe_peft.interop.merged import export_merged, plain_model
from moe_peft.interop.parity import Parity, parity, random_rows, read_back, text_rows
from moe_peft.interop.peft import export_peft
from moe_peft.layers.adapted import AdaptedLinear
from moe_peft.methods.lora import LoRA
from tests.tiny import build, output, random_batch
from tests.tiny_checkpoints import TASKS, backbones, trained  # noqa: F401  (a fixture)

AUTO = {"causal": "AutoModelForCausalLM", "seq2seq": "AutoModelForSeq2SeqLM", "classifier": "AutoModel"}


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


@pytest.mark.parametrize("to", ["peft", "merged"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_roundings_of_the_dtype_are_faithful_and_another_task_is_not(backbones, tmp_path, dtype, to):  # noqa: F811
    module = trained(backbones["causal"], "MoRE", dtype=dtype, rank=5)
    write(module, to, tmp_path / "a", "tone")
    rows = random_rows(module)
    assert parity(module, tmp_path / "a", "tone", rows).faithful
    assert not parity(module, tmp_path / "a", "mood", rows).faithful


def test_the_tolerance_is_relative_and_no_number_is_outside_it():
    assert Parity(1.0, 1000.0, 1e-3, "peft").faithful and not Parity(1.1, 1000.0, 1e-3, "peft").faithful
    assert not Parity(math.nan, 1000.0, 1e-3, "peft").faithful and not Parity(0.0, math.nan, 1e-3, "peft").faithful


@pytest.mark.parametrize("to", ["peft", "merged"])
def test_an_export_names_the_backbone_and_not_where_its_gguf_file_was_unpacked(backbones, tmp_path, monkeypatch, to):  # noqa: F811
    monkeypatch.setattr(moe_peft.backbones, "dequantised", lambda *_: backbones["causal"])
    backbone = CausalLM("org/tiny", dtype="float32", gguf_file="tiny.gguf")
    write(build(LoRA, backbone=backbone), to, tmp_path / "a", "tone")
    files = {file.name: file.read_text() for file in (tmp_path / "a").glob("*.json")}
    assert not [name for name, text in files.items() if str(backbones["causal"]) in text]
    if to == "peft":
        assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "org/tiny"


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
    found = export(module, to, "all", tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["README.md", "mood", "sci_topic", "tone"]
    assert [each.task for each in found] == [spec.name for spec in TASKS] and unfaithful(found) is None
    for each in found:
        difference, largest = each.parity.difference, each.parity.largest
        assert str(each).startswith(
            f"{each.folder}: task '{each.task}', largest difference {difference:.1e} of outputs"
        )
        assert difference < 1e-4 < largest
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
