"""Context-PEFT against a loop over tokens, and what its experts are in generation, where nobody says it."""

import pytest
import torch

from moe_peft.counting import count_parameters
from moe_peft.layers.given import WEIGHTS
from moe_peft.methods.context_peft import ContextPEFT
from moe_peft.methods.lora import LoRA
from tests.tiny import batch_of, build, come_alive, logits, random_batch, randomise
from tests.tiny_counts import meta

GENERATE = {"max_new_tokens": 5, "min_new_tokens": 5, "pad_token_id": 0, "eos_token_id": None, "do_sample": False}


def by_part(batch, **arguments):
    """A method whose contexts are prompt and answer, alive, in fp64."""
    return come_alive(build(ContextPEFT, contexts="part", rank=3, **arguments), batch).double().eval()


def watched(module, slot):
    """The inputs and outputs of a linear at every call, as they come."""
    seen = []
    module.adapted[slot].register_forward_hook(lambda layer, args, out: seen.append((args[0], out)))
    return seen


def expected(layer, x, contexts):
    """W0 x + s B_c A_c x, token by token."""
    y = layer.base(x)
    for row in range(len(x)):
        for at in range(x.shape[1]):
            c = contexts[row, at]
            a, b = layer.factors.A[3 * c : 3 * c + 3], layer.factors.B[:, 3 * c : 3 * c + 3]
            y[row, at] += layer.scale * b @ (a @ x[row, at])
    return y


def test_prompt_and_answer_have_an_expert_each():
    batch = random_batch()
    module = by_part(batch)
    slot = next(iter(module.adapted))
    seen = watched(module, slot)
    with torch.no_grad():
        logits(module, batch)
        (x, y), real = seen[0], batch["attention_mask"].bool()
        found = expected(module.adapted[slot], x, (~batch["prompt_mask"]).long())
    assert batch["prompt_mask"].any() and (batch["attention_mask"].bool() & ~batch["prompt_mask"]).any()
    torch.testing.assert_close(y[real], found[real], rtol=0, atol=1e-10)


def test_one_context_alone_is_a_lora():
    batch = random_batch()
    batch["prompt_mask"] = batch["attention_mask"].bool()
    module, lora = build(ContextPEFT, contexts="part", rank=3), build(LoRA, rank=3)
    randomise(module)
    for slot, layer in module.adapted.items():
        lora.adapted[slot].factors.A.data.copy_(layer.factors.A[:3])
        lora.adapted[slot].factors.B.data.copy_(layer.factors.B[:, :3])
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        torch.testing.assert_close(logits(module, batch)[real], logits(lora, batch)[real], rtol=0, atol=1e-4)


def test_contexts_and_experts_swapped_together_change_nothing():
    batch = random_batch()
    module, real = by_part(batch), batch["attention_mask"].bool()
    with torch.no_grad():
        before = logits(module, batch)
        for layer in module.adapted.values():
            layer.factors.A.copy_(layer.factors.A.roll(3, 0))
            layer.factors.B.copy_(layer.factors.B.roll(3, 1))
        assert (logits(module, batch) - before)[real].abs().max() > 0.01
        batch["prompt_mask"] = ~batch["prompt_mask"]
        torch.testing.assert_close(logits(module, batch)[real], before[real], rtol=0, atol=1e-10)


@pytest.mark.parametrize("contexts", ["task", "part"])
def test_tokens_of_a_context_send_no_gradient_to_another_expert(contexts):
    batch = random_batch()
    module = come_alive(build(ContextPEFT, contexts=contexts, rank=3), batch)
    batch |= {"task_id": torch.zeros_like(batch["task_id"]), "prompt_mask": torch.ones_like(batch["prompt_mask"])}
    module(batch).sum().backward()
    for layer in module.adapted.values():
        own, other = layer.factors.A.grad.split(3)
        assert own.abs().max() > 0 and not other.any()


@pytest.mark.parametrize("prompts", [[[5, 9, 33], [7, 8]], [[5], [7]]], ids=["long", "one token"])
@pytest.mark.parametrize("options", [{"use_cache": True}, {"use_cache": False}, {"use_cache": True, "num_beams": 2}])
def test_what_is_generated_is_an_answer(prompts, options):
    batch = batch_of(prompts, [[]] * 2)
    module = by_part(batch_of([[5, 9, 33], [7, 8]], [[1], [2]]))
    slot, width = next(iter(module.adapted)), batch["input_ids"].shape[1]
    seen, done = watched(module, slot), 0
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        module.begin(batch)
        module.model.generate(**inputs, **GENERATE, **options)
        for x, y in seen:
            first = done if options["use_cache"] else 0
            contexts = (torch.arange(first, first + x.shape[1]) >= width).long().expand(len(x), -1)
            torch.testing.assert_close(y, expected(module.adapted[slot], x, contexts), rtol=0, atol=1e-10)
            done += x.shape[1]
    assert len(seen) == 5


def test_a_later_batch_starts_from_its_own_first_token():
    batch = batch_of([[5, 9, 33], [7, 8]], [[1], [2]])
    module = by_part(batch)
    with torch.no_grad():
        before = module(batch)
        module.begin(batch)
        module.model.generate(batch["input_ids"], attention_mask=batch["attention_mask"], **GENERATE)
        assert torch.equal(module(batch), before)


def test_a_layer_without_a_batch_has_no_context():
    module = build(ContextPEFT, contexts="part")
    with pytest.raises(ValueError, match="was given no weights for these rows: go through the module's forward"):
        module.model(torch.tensor([[5, 6]]))
    assert module.context.get_tokens(WEIGHTS, 1, 2) is None


@pytest.mark.parametrize("kind", ["seq2seq", "classifier"])
def test_parts_of_a_row_need_a_decoder(kind):
    with pytest.raises(ValueError, match="contexts: part needs a CausalLM, not a .*; use task"):
        build(ContextPEFT, kind, contexts="part")


def test_counts():
    for contexts, experts in (("task", 8), ("part", 2)):
        counts = count_parameters(meta("context-peft", contexts=contexts))
        assert counts["trainable"] == counts["factors"] == experts * 19_988_480
