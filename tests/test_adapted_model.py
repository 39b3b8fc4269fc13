"""Adapters on a plain Hugging Face model: what the module computes, in any batch, with any decoding, and taken off."""

import contextlib
import json
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

import moe_peft
from moe_peft.fingerprint import fingerprint
from moe_peft.interop.adapter_folder import ABOUT, TENSORS, portable, write_adapter
from moe_peft.layers.adapted import AdaptedLinear
from moe_peft.methods.scoring import pooled_features
from moe_peft.runs import load_module
from tests.tiny import output, random_batch
from tests.tiny_checkpoints import TASKS, backbones, save, trained  # noqa: F401  (a fixture)

METHODS = {
    "LoRA": ("LoRA", {"rank": 4}),
    "TRex": ("TRex", {"r1": 2, "r2": 3}),
    "MoR1E": ("TRex", {"r1": 4, "r2": 4, "mode": "rank1"}),
    "MoRE": ("MoRE", {"rank": 5}),
    "TTLoRA": ("TTLoRA", {"rank": 2}),
    "TTLoRAMoE": ("TTLoRAMoE", {"rank": 2}),
}
AUTO = {"causal": "AutoModelForCausalLM", "seq2seq": "AutoModelForSeq2SeqLM", "classifier": "AutoModel"}
TASK_IDS = [0, 2, 1, 1]
NAMES = [TASKS[task].name for task in TASK_IDS]
PROMPTS = [[5, 9, 33, 21, 60], [7, 8], [44, 45, 46], [90, 12, 13, 14, 15, 16, 17]]
GREEDY = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, "min_new_tokens": 6}


def base(backbones, kind="causal"):  # noqa: F811
    return getattr(transformers, AUTO[kind]).from_pretrained(backbones[kind], dtype=torch.float32).eval()


def exported(backbones, folder, name, kind="causal"):  # noqa: F811
    """A trained module of a method, and the same as a folder on a plain model."""
    method, arguments = METHODS[name]
    module = trained(backbones[kind], method, kind, **arguments)
    write_adapter(module, folder)
    return module, moe_peft.load_adapter(base(backbones, kind), folder)


def padded(prompts, side="left"):
    width = max(map(len, prompts))
    ids, mask = (torch.zeros(len(prompts), width, dtype=torch.int64) for _ in range(2))
    for row, prompt in enumerate(prompts):
        at = slice(width - len(prompt), width) if side == "left" else slice(len(prompt))
        ids[row, at], mask[row, at] = torch.tensor(prompt), 1
    return {"input_ids": ids, "attention_mask": mask}


def plain_linears(model):
    return not any(isinstance(layer, AdaptedLinear) for layer in model.modules())


@pytest.mark.parametrize("kind", AUTO)
@pytest.mark.parametrize("name", METHODS)
def test_a_forward_is_the_modules_and_disabled_the_bare_bases(backbones, tmp_path, name, kind):  # noqa: F811
    module, model = exported(backbones, tmp_path / "a", name, kind)
    batch = random_batch(4, kind)
    batch["task_id"] = torch.tensor(TASK_IDS)
    module.route_by_task = True
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    inputs |= {"labels": batch["labels"]} if kind == "seq2seq" else {}
    batch = inputs | {"task_id": batch["task_id"]}  # a plain call says nothing of prompt and answer

    def found():
        answer = model(**inputs)
        return answer.logits if hasattr(answer, "logits") else answer.last_hidden_state

    with torch.no_grad(), model.routing(tasks=NAMES):
        torch.testing.assert_close(found(), output(module, batch), rtol=0, atol=1e-6)
        with model.disable_adapter():
            disabled = found()
        assert (found() - disabled).abs().max() > 1e-3
        bare = base(backbones, kind)(**inputs)
        assert torch.equal(disabled, bare.logits if hasattr(bare, "logits") else bare.last_hidden_state)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("kind", ["causal", "seq2seq"])
@pytest.mark.parametrize("name", METHODS)
def test_a_batch_of_mixed_tasks_generates_what_each_row_does_alone(backbones, tmp_path, name, kind, use_cache):  # noqa: F811
    _, model = exported(backbones, tmp_path / "a", name, kind)
    options = GREEDY | {"use_cache": use_cache, "return_dict_in_generate": True, "output_logits": True}
    with model.routing(tasks=NAMES):
        together = model.generate(**padded(PROMPTS), **options)
        with model.disable_adapter():
            bare = model.generate(**padded(PROMPTS), **options)
    assert ((together.logits[0] - bare.logits[0]).abs().amax(1) > 1e-3).all()
    for row, (prompt, task) in enumerate(zip(PROMPTS, NAMES, strict=True)):
        with model.routing(tasks=task):
            alone = model.generate(**padded([prompt]), **options)
        assert together.sequences[row, -6:].tolist() == alone.sequences[0, -6:].tolist(), row
        for step, own in zip(together.logits, alone.logits, strict=True):
            torch.testing.assert_close(step[row], own[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["MoRE", "TRex", "TTLoRAMoE"])
@pytest.mark.parametrize("kind", ["causal", "seq2seq"])
def test_beams_and_samples_of_a_row_are_routed_as_the_row(backbones, tmp_path, kind, name):  # noqa: F811
    _, model = exported(backbones, tmp_path / "a", name, kind)
    beams = GREEDY | {"num_beams": 3, "num_return_sequences": 2}
    sampled = GREEDY | {"do_sample": True, "top_k": 1, "num_return_sequences": 2}
    with model.routing(tasks=NAMES):
        found = model.generate(**padded(PROMPTS), **beams)
        drawn = model.generate(**padded(PROMPTS), **sampled)
        greedy = model.generate(**padded(PROMPTS), **GREEDY)
    assert torch.equal(drawn, greedy.repeat_interleave(2, 0))
    for row, (prompt, task) in enumerate(zip(PROMPTS, NAMES, strict=True)):
        with model.routing(tasks=task):
            alone = model.generate(**padded([prompt]), **beams)
        assert found[2 * row : 2 * row + 2, -6:].tolist() == alone[:, -6:].tolist(), row


@pytest.mark.parametrize("name", ["TRex", "TTLoRAMoE"])
def test_without_tasks_the_prompt_decides_at_every_prefill_and_holds_until_the_next(backbones, tmp_path, name):  # noqa: F811
    module, model = exported(backbones, tmp_path / "a", name)
    fact = {"TRex": "prior", "TTLoRAMoE": "task_id"}[name]
    inputs = padded(PROMPTS)
    with torch.no_grad():
        first = model(**inputs, use_cache=True)
        decided = model.active.context.get(fact, 4).clone()
        step = {"input_ids": first.logits[:, -1:].argmax(-1), "attention_mask": torch.ones(4, 8, dtype=torch.int64)}
        model(**step, past_key_values=first.past_key_values)
        assert torch.equal(model.active.context.get(fact, 4), decided)
        model(**padded(PROMPTS[::-1]))
        assert not torch.equal(model.active.context.get(fact, 4), decided)
        torch.testing.assert_close(model.active.context.get(fact, 4), decided.flip(0))
    module.begin({"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]})
    torch.testing.assert_close(module.context.get(fact, 4), decided)


def test_a_prompt_mask_keeps_the_answer_from_the_prior(backbones, tmp_path):  # noqa: F811
    _, model = exported(backbones, tmp_path / "a", "TRex")
    with torch.no_grad():
        model(**padded([[5, 9, 33]]))
        of_prompt = model.active.context.get("prior", 1)
        model(**padded([[5, 9, 33, 60, 61]]))
        assert not torch.allclose(model.active.context.get("prior", 1), of_prompt)
        with model.routing(prompt_mask=torch.tensor([[True, True, True, False, False]])):
            model(**padded([[5, 9, 33, 60, 61]]))
        assert torch.equal(model.active.context.get("prior", 1), of_prompt)


def test_a_call_that_names_no_task_raises_where_nothing_else_can_route(backbones, tmp_path):  # noqa: F811
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


def test_several_adapters_are_held_switched_and_taken_off(backbones, tmp_path):  # noqa: F811
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
            both(input_ids=torch.ones(4, 1, dtype=torch.int64), past_key_values=prefilled.past_key_values)
        both.set_adapter(None)
        assert torch.equal(both(**padded(PROMPTS)).logits, bare)
        both.delete_adapter("more")
        with pytest.raises(ValueError, match="no adapter 'more'; use one of trex"):
            both.set_adapter("more")
        assert both.unload() is plain and plain_linears(plain)
        assert not (plain._forward_pre_hooks or plain._forward_hooks or plain.lm_head._forward_pre_hooks)
        assert torch.equal(plain(**padded(PROMPTS)).logits, bare)


def test_merged_and_unloaded_is_the_routed_model_of_one_task(backbones, tmp_path):  # noqa: F811
    _, model = exported(backbones, tmp_path / "a", "MoRE")
    with torch.no_grad():
        with model.routing(tasks="sci/topic"):
            routed = model(**padded(PROMPTS)).logits
        merged = model.merge_and_unload("sci/topic")
        assert plain_linears(merged)
        torch.testing.assert_close(merged(**padded(PROMPTS)).logits, routed, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["MoRE", "TTLoRAMoE"])
def test_heads_answer_for_the_rows_tasks(backbones, tmp_path, name):  # noqa: F811
    module, model = exported(backbones, tmp_path / "a", name, "classifier")
    batch = random_batch(4, "classifier") | {"task_id": torch.tensor(TASK_IDS)}
    module.route_by_task = True
    module.begin(batch)
    with torch.no_grad():
        wanted = module.heads.scores(pooled_features(module.backbone, module.model, batch), batch["task_id"])
    with model.routing(tasks=NAMES):
        found = model.classify(batch["input_ids"], batch["attention_mask"])
    assert [len(row) for row in found] == [2, 2, 3, 3]
    assert all(row == pytest.approx(own, abs=1e-6) for row, own in zip(found, wanted, strict=True))
    if name == "MoRE":
        with pytest.raises(ValueError, match="MoRE routes by task"):
            model.classify(batch["input_ids"])
    else:
        assert all(model.classify(batch["input_ids"], batch["attention_mask"]))


def test_an_adapter_folder_keeps_every_bit_and_is_read_like_a_checkpoint(backbones, tmp_path):  # noqa: F811
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


def test_other_dtypes_move_the_base_and_every_adapter(backbones, tmp_path):  # noqa: F811
    _, model = exported(backbones, tmp_path / "a", "MoRE")
    moe_peft.load_adapter(model, tmp_path / "a", "again")
    model.to(torch.float64)
    for name in ("default", "again"):
        model.set_adapter(name)
        with torch.no_grad(), model.routing(tasks=NAMES):
            assert model(**padded(PROMPTS)).logits.dtype == torch.float64


def spoil(folder, what):
    tensors, about = load_file(folder / TENSORS), json.loads((folder / ABOUT).read_text())
    if what == "lacks":
        tensors.pop(next(name for name in tensors if "layers.1" in name))
    elif what == "shape":
        name = next(name for name in tensors if tensors[name].dim() == 2)
        tensors[name] = tensors[name][:1].clone()
    elif what == "fingerprint":
        about["fingerprint"] = "0" * 16
    elif what == "method":
        about["config"]["class_path"] = "NoSuchMethod"
    elif what == "format":
        about["format"] = 99
    save_file(tensors, folder / TENSORS)
    (folder / ABOUT).write_text(json.dumps(about) if what != "json" else "{")


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
def test_a_spoilt_folder_is_refused_in_one_line_and_the_model_stays_as_it_was(backbones, tmp_path, what, message):  # noqa: F811
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


def test_a_model_of_another_kind_and_a_folder_that_is_no_adapter_are_named(backbones, tmp_path):  # noqa: F811
    write_adapter(trained(backbones["causal"], "LoRA", rank=2), tmp_path / "a")
    with pytest.raises(ValueError, match="BertModel is no CausalLM; load the base with AutoModelForCausalLM"):
        moe_peft.load_adapter(base(backbones, "classifier"), tmp_path / "a")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty.*give a run, a checkpoint or an exported adapter"):
        moe_peft.load_adapter(base(backbones), tmp_path / "empty")


def test_importing_the_package_costs_nothing():
    code = "import moe_peft, sys; print(sorted({'torch', 'lightning', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_a_lora_that_peft_wrote_computes_what_it_computes_there(backbones, tmp_path):  # noqa: F811
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


def test_a_lora_of_other_linears_or_sizes_leaves_the_model_as_it_was(backbones, tmp_path):  # noqa: F811
    peft = pytest.importorskip("peft")
    theirs = peft.get_peft_model(base(backbones, "seq2seq"), peft.LoraConfig(r=2, target_modules=["q", "wi"]))
    theirs.save_pretrained(tmp_path / "a")
    model = base(backbones)
    with pytest.raises(ValueError, match="another base"):
        moe_peft.load_adapter(model, tmp_path / "a")
    assert plain_linears(model) and not model._forward_pre_hooks and not model.lm_head._forward_pre_hooks


def test_a_cached_call_under_other_tasks_than_its_prefill_is_refused(backbones, tmp_path):  # noqa: F811
    _, model = exported(backbones, tmp_path / "a", "MoRE")
    step = {"input_ids": torch.ones(1, 1, dtype=torch.int64)}
    with torch.no_grad():
        with model.routing(tasks="tone"):
            first = model(**padded(PROMPTS[:1]), use_cache=True).past_key_values
            model(**step, past_key_values=first)
        with pytest.raises(ValueError, match="were of tasks tone; prefill again"), model.routing(tasks="mood"):
            model(**step, past_key_values=first)
        with model.routing(tasks="mood"):
            model(**padded(PROMPTS[1:2]))
        with pytest.raises(ValueError, match="were of tasks mood; prefill again"), model.routing(tasks="tone"):
            model(**step, past_key_values=first)


def test_disabled_stays_disabled_whichever_adapter_is_made_active(backbones, tmp_path):  # noqa: F811
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


def test_the_heads_of_an_earlier_call_never_answer(backbones, tmp_path):  # noqa: F811
    _, model = exported(backbones, tmp_path / "a", "MoRE", "classifier")
    with model.routing(tasks="tone"):
        model.classify(**padded(PROMPTS))
    with pytest.raises(ValueError, match="the bare base has no heads"), model.disable_adapter():
        model.classify(**padded(PROMPTS))


def test_what_would_write_an_adapted_model_as_a_plain_one_is_refused(backbones, tmp_path):  # noqa: F811
    _, model = exported(backbones, tmp_path / "a", "LoRA")
    for write in (model.save_pretrained, model.push_to_hub):
        with pytest.raises(ValueError, match="merge_and_unload"):
            write(tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_recomputed_calls_keep_the_routing_that_they_had(backbones, tmp_path):  # noqa: F811
    gradients = []
    for recomputed in (False, True):
        _, model = exported(backbones, tmp_path / str(recomputed), "MoRE")
        model.train()
        if recomputed:
            model.gradient_checkpointing_enable()
            for block in model.model.model.layers:  # HF recomputes only what is training
                block.training = True
        total = torch.zeros(())
        for task in ("tone", "mood"):
            with model.routing(tasks=task):
                total = total + model(**padded(PROMPTS)).logits.square().mean()
        total.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert gradients[0] and all(grad.abs().max() > 0 for grad in gradients[0])
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(again, plain, rtol=1e-4, atol=1e-6)


def test_a_cache_of_the_bare_model_is_not_routed_as_an_earlier_call(backbones, tmp_path):  # noqa: F811
    _, model = exported(backbones, tmp_path / "a", "TRex")
    with torch.no_grad():
        model(**padded(PROMPTS))
        with model.disable_adapter():
            cache = model(**padded(PROMPTS[::-1]), use_cache=True).past_key_values
        with pytest.raises(ValueError, match="without a semantic prior"):
            model(input_ids=torch.ones(4, 1, dtype=torch.int64), past_key_values=cache)


@pytest.mark.parametrize("name", ["MoRE", "TRex"])
def test_an_interrupted_forward_leaves_no_routing_behind(backbones, tmp_path, name):  # noqa: F811
    _, model = exported(backbones, tmp_path / "a", name, "seq2seq")
    options = GREEDY | {"return_dict_in_generate": True, "output_logits": True}

    def answer():
        with model.routing(tasks="mood") if name == "MoRE" else contextlib.nullcontext():
            return model.generate(**padded(PROMPTS), **options).logits[0]

    wanted = answer()

    def interrupt(*args):
        raise KeyboardInterrupt

    hook = model.model.lm_head.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt), model.routing(tasks="tone"):
        model(**padded(PROMPTS[::-1]), decoder_input_ids=torch.zeros(4, 1, dtype=torch.int64))
    hook.remove()
    assert torch.equal(answer(), wanted)


def loud_padding(model):
    """Makes padding something that a router would notice."""
    model.get_input_embeddings().weight.data[0] = 3.0
    return model


@pytest.mark.parametrize("cache", [None, "static", "given"])
def test_no_router_reads_padding_whatever_the_cache(backbones, tmp_path, cache):  # noqa: F811
    module = trained(backbones["causal"], "TRex", r1=2, r2=3)
    loud_padding(module.model)
    module.fingerprint = fingerprint(module.model)
    write_adapter(module, tmp_path / "a")
    model = moe_peft.load_adapter(loud_padding(base(backbones)), tmp_path / "a")
    options = GREEDY | {"return_dict_in_generate": True, "output_logits": True}

    def first(prompts, **more):
        if cache == "static":
            more["cache_implementation"] = "static"
        if cache == "given":
            more["past_key_values"] = transformers.DynamicCache(config=model.config)
        return model.generate(**padded(prompts), **options, **more).logits[0]

    together = first(PROMPTS)
    for row, prompt in enumerate(PROMPTS):
        torch.testing.assert_close(together[row], first([prompt])[0], rtol=0, atol=1e-4)


def test_beams_with_an_empty_cache_and_drafts_by_lookup_are_routed(backbones, tmp_path):  # noqa: F811
    _, model = exported(backbones, tmp_path / "a", "MoRE")
    with model.routing(tasks=NAMES):
        cache = transformers.DynamicCache(config=model.config)
        beams = model.generate(**padded(PROMPTS), **GREEDY, num_beams=2, past_key_values=cache)
        assert torch.equal(beams, model.generate(**padded(PROMPTS), **GREEDY, num_beams=2))
    prompt = padded([[5, 9, 5, 9, 5, 9, 5]])
    with model.routing(tasks="mood"):
        drafted = model.generate(**prompt, **GREEDY, prompt_lookup_num_tokens=3)
        assert torch.equal(drafted, model.generate(**prompt, **GREEDY))


def test_unload_and_a_failed_load_give_everything_back(backbones, tmp_path):  # noqa: F811
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


def test_a_folder_chooses_no_place_to_write(backbones, tmp_path):  # noqa: F811
    features = {"class_path": "HiddenStates", "init_args": {"layer": None, "cache_dir": str(tmp_path / "mine")}}
    module = trained(backbones["causal"], "TTLoRAMoE", features=features)
    write_adapter(module, tmp_path / "a")
    about = json.loads((tmp_path / "a" / ABOUT).read_text())
    assert about["config"]["init_args"]["features"]["init_args"]["cache_dir"] is None
    about["config"]["init_args"]["features"]["init_args"]["cache_dir"] = str(tmp_path / "elsewhere")
    (tmp_path / "a" / ABOUT).write_text(json.dumps(about))
    moe_peft.load_adapter(base(backbones), tmp_path / "a")(**padded(PROMPTS))
    assert not (tmp_path / "elsewhere").exists()


def test_a_prompt_mask_of_another_shape_is_refused(backbones, tmp_path):  # noqa: F811
    _, model = exported(backbones, tmp_path / "a", "TRex")
    with pytest.raises(ValueError, match="prompt_mask"), model.routing(prompt_mask=torch.ones(1, 7, dtype=torch.bool)):
        model(**padded(PROMPTS))
