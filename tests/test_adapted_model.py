"""Adapters on a plain Hugging Face model: what the module computes, in any batch, with any decoding."""

import contextlib
import subprocess
import sys

import pytest
import torch
import transformers

import moe_peft
from moe_peft.fingerprint import fingerprint
from moe_peft.interop.adapter_folder import write_adapter
from moe_peft.methods.scoring import pooled_features
from moe_peft.quirks import CACHE
from tests.tiny import output, random_batch
from tests.tiny_adapted import AUTO, GREEDY, METHODS, NAMES, PROMPTS, TASK_IDS, base, exported, padded
from tests.tiny_checkpoints import backbones, trained

FIXTURES = (backbones,)


@pytest.mark.parametrize("kind", AUTO)
@pytest.mark.parametrize("name", METHODS)
def test_a_forward_is_the_modules_and_disabled_the_bare_bases(backbones, tmp_path, name, kind):
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
def test_a_batch_of_mixed_tasks_generates_what_each_row_does_alone(backbones, tmp_path, name, kind, use_cache):
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
def test_beams_and_samples_of_a_row_are_routed_as_the_row(backbones, tmp_path, kind, name):
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


def test_beams_with_an_empty_cache_and_drafts_by_lookup_are_routed(backbones, tmp_path):
    _, model = exported(backbones, tmp_path / "a", "MoRE")
    with model.routing(tasks=NAMES):
        cache = transformers.DynamicCache(config=model.config)
        beams = model.generate(**padded(PROMPTS), **GREEDY, num_beams=2, **{CACHE: cache})
        assert torch.equal(beams, model.generate(**padded(PROMPTS), **GREEDY, num_beams=2))
    prompt = padded([[5, 9, 5, 9, 5, 9, 5]])
    with model.routing(tasks="mood"):
        drafted = model.generate(**prompt, **GREEDY, prompt_lookup_num_tokens=3)
        assert torch.equal(drafted, model.generate(**prompt, **GREEDY))


@pytest.mark.parametrize("name", ["TRex", "TTLoRAMoE"])
def test_without_tasks_the_prompt_decides_at_every_prefill_and_holds_until_the_next(backbones, tmp_path, name):
    module, model = exported(backbones, tmp_path / "a", name)
    fact = {"TRex": "prior", "TTLoRAMoE": "task_id"}[name]
    inputs = padded(PROMPTS)
    with torch.no_grad():
        first = model(**inputs, use_cache=True)
        decided = model.active.context.get(fact, 4).clone()
        step = {"input_ids": first.logits[:, -1:].argmax(-1), "attention_mask": torch.ones(4, 8, dtype=torch.int64)}
        model(**step, **{CACHE: first[CACHE]})
        assert torch.equal(model.active.context.get(fact, 4), decided)
        model(**padded(PROMPTS[::-1]))
        assert not torch.equal(model.active.context.get(fact, 4), decided)
        torch.testing.assert_close(model.active.context.get(fact, 4), decided.flip(0))
    module.begin({"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]})
    torch.testing.assert_close(module.context.get(fact, 4), decided)


def test_a_prompt_mask_keeps_the_answer_from_the_prior(backbones, tmp_path):
    _, model = exported(backbones, tmp_path / "a", "TRex")
    with torch.no_grad():
        model(**padded([[5, 9, 33]]))
        of_prompt = model.active.context.get("prior", 1)
        model(**padded([[5, 9, 33, 60, 61]]))
        assert not torch.allclose(model.active.context.get("prior", 1), of_prompt)
        with model.routing(prompt_mask=torch.tensor([[True, True, True, False, False]])):
            model(**padded([[5, 9, 33, 60, 61]]))
        assert torch.equal(model.active.context.get("prior", 1), of_prompt)


def loud_padding(model):
    """Makes padding something that a router would notice."""
    model.get_input_embeddings().weight.data[0] = 3.0
    return model


@pytest.mark.parametrize("cache", [None, "static", "given"])
def test_no_router_reads_padding_whatever_the_cache(backbones, tmp_path, cache):
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
            more[CACHE] = transformers.DynamicCache(config=model.config)
        return model.generate(**padded(prompts), **options, **more).logits[0]

    together = first(PROMPTS)
    for row, prompt in enumerate(PROMPTS):
        torch.testing.assert_close(together[row], first([prompt])[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["MoRE", "TTLoRAMoE"])
def test_heads_answer_for_the_rows_tasks(backbones, tmp_path, name):
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


def test_recomputed_calls_keep_the_routing_that_they_had(backbones, tmp_path):
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


@pytest.mark.parametrize("name", ["MoRE", "TRex"])
def test_an_interrupted_forward_leaves_no_routing_behind(backbones, tmp_path, name):
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


def test_importing_the_package_costs_nothing():
    code = "import moe_peft, sys; print(sorted({'torch', 'lightning', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
