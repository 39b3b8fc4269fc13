"""Adapters on a plain Hugging Face model: calls that would be routed wrong and folders that do not fit are refused."""

import pytest
import torch

import moe_peft
from moe_peft.interop.adapter_folder import write_adapter
from moe_peft.quirks import CACHE
from tests.tiny_adapted import GREEDY, PROMPTS, base, exported, padded, plain_linears, spoil
from tests.tiny_checkpoints import backbones, trained

FIXTURES = (backbones,)


def test_a_call_that_names_no_task_raises_where_nothing_else_can_route(backbones, tmp_path):
    _, model = exported(backbones, tmp_path / "a", "MoRE")
    with pytest.raises(ValueError, match=r"MoRE routes by task.*routing\(tasks"):
        model(**padded(PROMPTS))
    with pytest.raises(ValueError, match="2 tasks for 4 rows"), model.routing(tasks=["tone", "mood"]):
        model(**padded(PROMPTS))
    with pytest.raises(ValueError, match="no task 'rte'; use one of tone"), model.routing(tasks="rte"):
        pass
    with pytest.raises(ValueError, match="inputs_embeds"), model.routing(tasks="tone"):
        model(inputs_embeds=torch.zeros(1, 3, 32))
    with pytest.raises(ValueError, match="prefill_chunk_size"), model.routing(tasks="tone"):
        model.generate(**padded(PROMPTS), **GREEDY, prefill_chunk_size=3)


def test_a_cached_call_under_other_tasks_than_its_prefill_is_refused(backbones, tmp_path):
    _, model = exported(backbones, tmp_path / "a", "MoRE")
    step = {"input_ids": torch.ones(1, 1, dtype=torch.int64)}
    with torch.no_grad():
        with model.routing(tasks="tone"):
            first = model(**padded(PROMPTS[:1]), use_cache=True)[CACHE]
            model(**step, **{CACHE: first})
        with pytest.raises(ValueError, match="were of tasks tone; prefill again"), model.routing(tasks="mood"):
            model(**step, **{CACHE: first})
        with model.routing(tasks="mood"):
            model(**padded(PROMPTS[1:2]))
        with pytest.raises(ValueError, match="were of tasks mood; prefill again"), model.routing(tasks="tone"):
            model(**step, **{CACHE: first})


def test_a_cache_of_the_bare_model_is_not_routed_as_an_earlier_call(backbones, tmp_path):
    _, model = exported(backbones, tmp_path / "a", "TRex")
    with torch.no_grad():
        model(**padded(PROMPTS))
        with model.disable_adapter():
            cache = model(**padded(PROMPTS[::-1]), use_cache=True)[CACHE]
        with pytest.raises(ValueError, match="without a semantic prior"):
            model(input_ids=torch.ones(4, 1, dtype=torch.int64), **{CACHE: cache})


def test_a_prompt_mask_of_another_shape_is_refused(backbones, tmp_path):
    _, model = exported(backbones, tmp_path / "a", "TRex")
    with pytest.raises(ValueError, match="prompt_mask"), model.routing(prompt_mask=torch.ones(1, 7, dtype=torch.bool)):
        model(**padded(PROMPTS))


def test_the_heads_of_an_earlier_call_never_answer(backbones, tmp_path):
    _, model = exported(backbones, tmp_path / "a", "MoRE", "classifier")
    with model.routing(tasks="tone"):
        model.classify(**padded(PROMPTS))
    with pytest.raises(ValueError, match="the bare base has no heads"), model.disable_adapter():
        model.classify(**padded(PROMPTS))


def test_what_would_write_an_adapted_model_as_a_plain_one_is_refused(backbones, tmp_path):
    _, model = exported(backbones, tmp_path / "a", "LoRA")
    for write in (model.save_pretrained, model.push_to_hub):
        with pytest.raises(ValueError, match="merge_and_unload"):
            write(tmp_path / "b")
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("lacks", "lacks 1 tensors, first"),
        ("shape", "has shape"),
        ("fingerprint", "load that base, of the same revision"),
        ("method", "model that is unknown here"),
        ("format", "format 99"),
        ("json", "truncated or no JSON"),
    ],
)
def test_a_spoilt_folder_is_refused_in_one_line_and_the_model_stays_as_it_was(backbones, tmp_path, what, message):
    write_adapter(trained(backbones["causal"], "MoRE", rank=5), tmp_path / "a")
    spoil(tmp_path / "a", what)
    model = base(backbones)
    with torch.no_grad():
        before = model(**padded(PROMPTS)).logits
        with pytest.raises(ValueError, match=message) as caught:
            moe_peft.load_adapter(model, tmp_path / "a")
        assert "\n" not in str(caught.value)
        assert plain_linears(model) and not model._forward_pre_hooks
        assert torch.equal(model(**padded(PROMPTS)).logits, before)


def test_a_model_of_another_kind_and_a_folder_that_is_no_adapter_are_named(backbones, tmp_path):
    write_adapter(trained(backbones["causal"], "LoRA", rank=2), tmp_path / "a")
    with pytest.raises(ValueError, match="BertModel is no CausalLM; load the base with AutoModelForCausalLM"):
        moe_peft.load_adapter(base(backbones, "classifier"), tmp_path / "a")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty.*give a run, a checkpoint or an exported adapter"):
        moe_peft.load_adapter(base(backbones), tmp_path / "empty")


def test_a_lora_of_other_linears_or_sizes_leaves_the_model_as_it_was(backbones, tmp_path):
    peft = pytest.importorskip("peft")
    theirs = peft.get_peft_model(base(backbones, "seq2seq"), peft.LoraConfig(r=2, target_modules=["q", "wi"]))
    theirs.save_pretrained(tmp_path / "a")
    model = base(backbones)
    with pytest.raises(ValueError, match="another base"):
        moe_peft.load_adapter(model, tmp_path / "a")
    assert plain_linears(model) and not model._forward_pre_hooks and not model.lm_head._forward_pre_hooks
