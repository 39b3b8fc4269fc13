"""A LoRA that PEFT wrote, as our method and back in PEFT's files: the same function, the same bytes."""

import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from moe_peft.backbones import CausalLM
from moe_peft.interop.lora_module import lora_module
from moe_peft.interop.parity import parity, random_rows
from moe_peft.interop.peft import export_peft
from moe_peft.methods.lora import LoRA
from tests.interop.test_lora_import import PATTERNS, plain, spoil, written
from tests.tiny import LLAMA, build, come_alive, output, random_batch, randomise, tiny_backbone

FILES = ("adapter_model.safetensors", "adapter_config.json")
KINDS = [
    {},
    {"use_rslora": True, "lora_dropout": 0.1, "task_type": "CAUSAL_LM"},
    PATTERNS,
    {**PATTERNS, "use_rslora": True},
    {"target_modules": ["q_proj", "mlp.up_proj"], "bias": "all"},
    {"target_modules": r".*layers\.1\.(self_attn|mlp)\.(k|down)_proj", "r": 5, "lora_alpha": 7},
    {"target_modules": ["v_proj", "down_proj"], "layers_to_transform": [1], "init_lora_weights": "gaussian"},
    {"exclude_modules": ["up_proj"], "revision": "main"},
]


def module_of(folder):
    """Our method, on the base that PEFT's LoRA is of."""
    torch.manual_seed(0)
    return lora_module(folder, tiny_backbone())


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_imported_and_exported_the_files_are_the_same_to_the_byte(tmp_path, options):
    written(tmp_path / "a", **options)
    module = module_of(tmp_path / "a")
    export_peft(module, tmp_path / "b", 0)
    assert (tmp_path / "b" / FILES[0]).read_bytes() == (tmp_path / "a" / FILES[0]).read_bytes()
    theirs, ours = (json.loads((tmp_path / name / FILES[1]).read_text()) for name in "ab")
    assert list(ours.items()) == list(theirs.items())  # in this order, on which patterns depend


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_the_method_answers_as_peft_does(tmp_path, options):
    written(tmp_path / "a", **options)
    module, batch = module_of(tmp_path / "a"), random_batch()
    model = peft.PeftModel.from_pretrained(plain(), str(tmp_path / "a")).eval()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        with model.disable_adapter():
            assert (model(**inputs).logits - output(module, batch)).abs().max() > 1e-2
        torch.testing.assert_close(output(module, batch), model(**inputs).logits, rtol=0, atol=1e-5)


def test_tensors_of_another_dtype_come_back_in_it_while_they_fit_it(tmp_path):
    written(tmp_path / "a")
    file = tmp_path / "a" / FILES[0]
    save_file({name: value.bfloat16() for name, value in load_file(file).items()}, file, metadata={"format": "pt"})
    module = module_of(tmp_path / "a")
    export_peft(module, tmp_path / "b", 0)
    assert (tmp_path / "b" / FILES[0]).read_bytes() == file.read_bytes()
    layer = next(iter(module.adapted.values()))
    layer.factors.A.data += 1e-6  # as training would
    export_peft(module, tmp_path / "c", 0)
    assert {value.dtype for value in load_file(tmp_path / "c" / FILES[0]).values()} == {torch.float32, torch.bfloat16}


def test_the_uniform_form_describes_itself(tmp_path):
    written(tmp_path / "a", **PATTERNS)
    export_peft(module_of(tmp_path / "a"), tmp_path / "b", 0, uniform_rank=True)
    config = json.loads((tmp_path / "b" / FILES[1]).read_text())
    assert (config["r"], config["rank_pattern"]) == (5, {}) and "peft_version" not in config


def test_our_own_classifier_brings_its_head(tmp_path):
    source, batch = build(LoRA, "classifier", rank=3), random_batch(kind="classifier")
    come_alive(source, batch, scale=0.1).eval()
    export_peft(source, tmp_path / "a", "topic")
    torch.manual_seed(0)
    module = lora_module(tmp_path / "a", tiny_backbone("classifier"))
    of_topic = {**batch, "task_id": torch.ones_like(batch["task_id"]), "target": batch["target"]}
    of_first = {**of_topic, "task_id": torch.zeros_like(batch["task_id"])}
    with torch.no_grad():
        torch.testing.assert_close(module(of_first), source(of_topic), rtol=0, atol=1e-6)
    assert module.specs[0].name == "topic" and module.specs[0].choices == ("a", "b", "c")
    with pytest.raises(ValueError, match="' has a head; give the Classifier that it belongs to$"):
        lora_module(tmp_path / "a", tiny_backbone())


def test_patterns_of_a_yaml_are_those_of_peft(tmp_path):
    module = build(LoRA, rank=3, alpha=8.0, use_rslora=True, **PATTERNS)
    randomise(module.eval(), scale=0.1)
    assert {layer.factors.rank_in for layer in module.adapted.values()} == {2, 3, 5}
    model = peft.get_peft_model(
        plain(), peft.LoraConfig(r=3, lora_alpha=8, use_rslora=True, target_modules="all-linear", **PATTERNS)
    )
    for slot, layer in module.adapted.items():
        theirs = model.get_base_model().get_submodule(slot)
        assert (layer.factors.rank_in, layer.scale) == (theirs.r["default"], theirs.scaling["default"])
    export_peft(module, tmp_path / "a", 0)
    torch.manual_seed(0)  # the base that `build` adapted
    assert parity(module, tmp_path / "a", 0, random_rows(module)).difference < 1e-5


def test_a_pattern_that_means_nothing_is_warned_of_and_one_that_is_none_refused(caplog):
    build(LoRA, rank_pattern={"q_proj": 2, "proj": 3})
    assert caplog.messages == ["rank_pattern: 'proj' matches none of the adapted linears"]
    with pytest.raises(ValueError, match=r"^alpha_pattern: '\(' is no regular expression"):
        build(LoRA, alpha_pattern={"(": 2})
    with pytest.raises(ValueError, match="^rank: 0 must be at least 1"):
        build(LoRA, rank_pattern={"q_proj": 0})


# ---- what does not fit -----------------------------------------------------------------------------------------------


def drop(folder, *ends):
    """Takes linears out of the tensors' file."""
    file = folder / FILES[0]
    kept = {name: value for name, value in load_file(file).items() if not any(end in name for end in ends)}
    save_file(kept, file, metadata={"format": "pt"})


def wide():
    return CausalLM("wide", dtype="float32", shape=LLAMA | {"hidden_size": 40}, random_weights=True)


@pytest.mark.parametrize(
    ("spoilt", "backbone", "message"),
    [
        (lambda a: None, wide, r"k_proj is 32x16 there and 40x20 here; another base"),
        (lambda a: None, lambda: tiny_backbone("seq2seq"), r"adapts \S+ and others, which this backbone does not have"),
        (lambda a: drop(a, "layers.1"), tiny_backbone, r"lacks 2 linears that its target_modules name, first"),
        (lambda a: drop(a, "lora_B"), tiny_backbone, "has only lora_A; export the folder again"),
        (lambda a: spoil(a, base_model_name_or_path="tiny-causal", revision="v2"), tiny_backbone,
         "is of revision 'v2' of 'tiny-causal', here it is 'main'; set it so"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_in_one_line(tmp_path, spoilt, backbone, message):
    written(tmp_path / "a", target_modules=["q_proj", "k_proj"])
    spoilt(tmp_path / "a")
    with pytest.raises(ValueError, match=message) as caught:
        lora_module(tmp_path / "a", backbone())
    assert "\n" not in str(caught.value) and str(tmp_path / "a") in str(caught.value)


def test_another_base_of_the_same_shape_is_told_by_its_fingerprint(tmp_path):
    export_peft(build(LoRA, seed=1), tmp_path / "a", 0)
    with pytest.raises(
        ValueError, match=r"' is of another base: fingerprint \w{16}, here \w{16}; configure its backbone"
    ):
        module_of(tmp_path / "a")
