"""Adapters on a plain Hugging Face model: held, switched, merged, moved and taken off; the folders they come from."""

import json

import pytest
import torch
from torch import nn

import moe_peft
from moe_peft.interop.adapter_folder import ABOUT, TENSORS, portable, write_adapter
from moe_peft.quirks import CACHE
from moe_peft.runs import load_module
from tests.tiny import output, random_batch
from tests.tiny_adapted import NAMES, PROMPTS, base, exported, padded, plain_linears, spoil
from tests.tiny_checkpoints import backbones, save, trained

FIXTURES = (backbones,)


def test_several_adapters_are_held_switched_and_taken_off(backbones, tmp_path):
    alone = {}
    for name in ("MoRE", "TRex"):
        _, model = exported(backbones, tmp_path / name, name)
        with torch.no_grad(), model.routing(tasks=NAMES):
            alone[name] = model(**padded(PROMPTS)).logits
    plain = base(backbones)
    with torch.no_grad():
        bare = plain(**padded(PROMPTS)).logits
    both = moe_peft.load_adapter(plain, tmp_path / "MoRE", "more")
    assert moe_peft.load_adapter(both, tmp_path / "TRex", "trex") is both
    with torch.no_grad():
        for name, key in (("trex", "TRex"), ("more", "MoRE"), ("trex", "TRex")):
            both.set_adapter(name)
            with both.routing(tasks=NAMES):
                assert torch.equal(both(**padded(PROMPTS)).logits, alone[key])
        both.set_adapter("more")
        with both.disable_adapter():
            prefilled = both(**padded(PROMPTS), use_cache=True)
        with pytest.raises(ValueError, match="MoRE routes by task"):  # facts of before the switch are not these rows'
            both(input_ids=torch.ones(4, 1, dtype=torch.int64), **{CACHE: prefilled[CACHE]})
        both.set_adapter(None)
        assert torch.equal(both(**padded(PROMPTS)).logits, bare)
        both.delete_adapter("more")
        with pytest.raises(ValueError, match="no adapter 'more'; use one of trex"):
            both.set_adapter("more")
        assert both.unload() is plain and plain_linears(plain)
        assert not (plain._forward_pre_hooks or plain._forward_hooks or plain.lm_head._forward_pre_hooks)
        assert torch.equal(plain(**padded(PROMPTS)).logits, bare)


def test_disabled_stays_disabled_whichever_adapter_is_made_active(backbones, tmp_path):
    _, model = exported(backbones, tmp_path / "a", "MoRE")
    with torch.no_grad(), model.disable_adapter():
        bare = model(**padded(PROMPTS)).logits
        model.load_adapter(tmp_path / "a", "b")
        assert torch.equal(model(**padded(PROMPTS)).logits, bare)
        model.set_adapter("default")
        assert torch.equal(model(**padded(PROMPTS)).logits, bare)
    with torch.no_grad(), model.routing(tasks=NAMES):
        for name in ("default", "b"):
            model.set_adapter(name)
            assert (model(**padded(PROMPTS)).logits - bare).abs().max() > 1e-3


def test_merged_and_unloaded_is_the_routed_model_of_one_task(backbones, tmp_path):
    _, model = exported(backbones, tmp_path / "a", "MoRE")
    with torch.no_grad():
        with model.routing(tasks="sci/topic"):
            routed = model(**padded(PROMPTS)).logits
        merged = model.merge_and_unload("sci/topic")
        assert plain_linears(merged)
        torch.testing.assert_close(merged(**padded(PROMPTS)).logits, routed, rtol=0, atol=1e-5)


def test_other_dtypes_move_the_base_and_every_adapter(backbones, tmp_path):
    _, model = exported(backbones, tmp_path / "a", "MoRE")
    moe_peft.load_adapter(model, tmp_path / "a", "again")
    model.to(torch.float64)
    for name in ("default", "again"):
        model.set_adapter(name)
        with torch.no_grad(), model.routing(tasks=NAMES):
            assert model(**padded(PROMPTS)).logits.dtype == torch.float64


def test_unload_and_a_failed_load_give_everything_back(backbones, tmp_path):
    write_adapter(trained(backbones["causal"], "LoRA", rank=2), tmp_path / "a")
    write_adapter(trained(backbones["causal"], "LoRA", rank=2), tmp_path / "bad")
    spoil(tmp_path / "bad", "lacks")
    plain = base(backbones).train()
    with pytest.raises(ValueError, match="lacks"):
        moe_peft.load_adapter(plain, tmp_path / "bad")
    assert plain.training and all(parameter.requires_grad for parameter in plain.parameters())
    model = moe_peft.load_adapter(plain, tmp_path / "a")
    assert not any(parameter.requires_grad for parameter in plain.model.embed_tokens.parameters())
    model.delete_adapter("default")
    with pytest.raises(ValueError, match="lacks"):
        moe_peft.load_adapter(model, tmp_path / "bad")
    write_adapter(trained(backbones["causal"], "MoRE", rank=5), tmp_path / "more")
    with moe_peft.load_adapter(model, tmp_path / "more").routing(tasks=NAMES):
        model(**padded(PROMPTS))  # a user's own wrapper is not unloaded by what failed
    assert model.unload() is plain and plain.training and all(p.requires_grad for p in plain.parameters())


def test_an_adapter_folder_keeps_every_bit_and_is_read_like_a_checkpoint(backbones, tmp_path):
    module = trained(backbones["classifier"], "TTLoRAMoE", "classifier", router={"class_path": "RidgeRouter"})
    module.router.gram.copy_(torch.randn_like(module.router.gram))  # fp64, as its other sums
    write_adapter(module, tmp_path / "a")
    state, again = module.adapter_state(), load_module(tmp_path / "a")
    wanted = portable(json.loads(json.dumps(module.config)))  # a tuple is a list there
    assert {path.name for path in (tmp_path / "a").iterdir()} == {ABOUT, TENSORS}
    assert again.adapter_state().keys() == state.keys()
    assert again.config == wanted and "optimizer" in module.config["init_args"]
    for name, value in again.adapter_state().items():
        assert value.dtype == state[name].dtype and torch.equal(value, state[name]), name
    checkpoint = save(module, tmp_path / "run" / "checkpoints" / "best.ckpt")
    batch = random_batch(4, "classifier")
    assert torch.equal(output(load_module(checkpoint), batch), output(again, batch))


def test_a_folder_chooses_no_place_to_write(backbones, tmp_path):
    features = {"class_path": "HiddenStates", "init_args": {"layer": None, "cache_dir": str(tmp_path / "mine")}}
    module = trained(backbones["causal"], "TTLoRAMoE", features=features)
    write_adapter(module, tmp_path / "a")
    about = json.loads((tmp_path / "a" / ABOUT).read_text())
    assert about["config"]["init_args"]["features"]["init_args"]["cache_dir"] is None
    about["config"]["init_args"]["features"]["init_args"]["cache_dir"] = str(tmp_path / "elsewhere")
    (tmp_path / "a" / ABOUT).write_text(json.dumps(about))
    moe_peft.load_adapter(base(backbones), tmp_path / "a")(**padded(PROMPTS))
    assert not (tmp_path / "elsewhere").exists()


def test_a_lora_that_peft_wrote_computes_what_it_computes_there(backbones, tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], rank_pattern={"down_proj": 3}, lora_alpha=6)
    torch.manual_seed(0)
    theirs = peft.get_peft_model(base(backbones), config).eval()
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.2)
    theirs.save_pretrained(tmp_path / "a")
    with torch.no_grad():
        wanted, bare = theirs(**padded(PROMPTS)).logits, base(backbones)(**padded(PROMPTS)).logits
        assert (wanted - bare).abs().max() > 1e-3
        model = moe_peft.load_adapter(base(backbones), tmp_path / "a")
        torch.testing.assert_close(model(**padded(PROMPTS)).logits, wanted, rtol=0, atol=1e-5)
        assert not model.unload()._forward_pre_hooks
