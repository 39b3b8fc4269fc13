"""Routing facts: tied to their rows, repeated for beams, restored for recomputation, never stale."""

import pytest
import torch

from moe_peft.batch import content_key
from moe_peft.context import Routing, RoutingContext
from moe_peft.methods.trex import TRex
from tests.tiny import VOCABULARY, batch_of, build, come_alive, random_batch

PROMPTS = [[5, 6, 7, 8], [9, 10, 11, 12, 13, 14, 15], [20, 21, 22]]
GENERATORS = ["causal", "seq2seq"]


def begun(rows=3, seed=0):
    context = RoutingContext()
    ids = torch.randint(1, VOCABULARY, (rows, 5), generator=torch.Generator().manual_seed(seed))
    return context, context.begin(ids, torch.ones_like(ids)), ids


# ---- content keys ----------------------------------------------------------------------------------------------------


def key_of(rows, **options):
    batch = batch_of(rows, [[]] * len(rows), **options)
    return content_key(batch["input_ids"], batch["attention_mask"])


def test_a_content_key_does_not_see_padding():
    left = key_of(PROMPTS, side="left")
    assert torch.equal(key_of(PROMPTS, side="right"), left)
    assert torch.equal(key_of(PROMPTS, side="left", extra=4), left)
    assert torch.equal(torch.cat([key_of([prompt]) for prompt in PROMPTS]), left)


def test_a_content_key_does_not_read_what_stands_at_padding():
    batch = batch_of(PROMPTS, [[]] * 3)
    dirty = torch.where(batch["attention_mask"] == 1, batch["input_ids"], 77)
    assert torch.equal(content_key(dirty, batch["attention_mask"]), key_of(PROMPTS))


def test_a_content_key_sees_order_length_and_every_token():
    generator = torch.Generator().manual_seed(0)
    row = torch.randint(0, 50_000, (64,), generator=generator).tolist()
    others = [row[1:], row[:-1], row + [0], [0] + row, row[::-1]]
    others += [row[:i] + [row[i] + 1] + row[i + 1 :] for i in range(64)]
    others += [row[:i] + [row[i + 1], row[i]] + row[i + 2 :] for i in range(63)]
    keys = {key_of([other]).item() for other in [row, *others]}
    assert len(keys) == 1 + len(others)


def test_content_keys_of_many_short_rows_do_not_collide():
    rows = torch.cartesian_prod(torch.arange(60), torch.arange(60), torch.arange(60))
    assert len(content_key(rows, torch.ones_like(rows)).unique()) == len(rows)


# ---- facts -----------------------------------------------------------------------------------------------------------


def test_a_fact_of_the_batch_is_returned_row_by_row():
    context, key, _ = begun()
    fact = torch.randn(3, 4)
    context.put("prior", fact, key)
    assert context.get("prior", 3) is fact
    assert context.get("task_id", 3) is None


def test_a_fact_of_the_same_rows_under_other_padding_is_taken():
    context = RoutingContext()
    batch = batch_of(PROMPTS, [[]] * 3)
    context.begin(batch["input_ids"], batch["attention_mask"])
    fact = torch.randn(3, 4)
    context.put("prior", fact, key_of(PROMPTS, side="right", extra=2))
    assert context.get("prior", 3) is fact


@pytest.mark.parametrize("stale", ["other rows", "other order", "fewer rows", "no batch"])
def test_a_fact_of_other_rows_raises(stale):
    context, key, ids = begun()
    other = {"other rows": begun(seed=1)[1], "other order": key.flip(0), "fewer rows": key[:1], "no batch": key}[stale]
    context = RoutingContext() if stale == "no batch" else context
    with pytest.raises(ValueError, match="routing fact 'prior' was computed for another batch"):
        context.put("prior", torch.randn(len(other), 4), other)


def test_a_new_batch_forgets_the_facts_and_records_of_the_last():
    context, key, ids = begun()
    context.put("prior", torch.randn(3, 4), key)
    context.recording = True
    context.record("slot", Routing(torch.ones(3, 1, 4)))
    context.begin(ids, torch.ones_like(ids))
    assert context.get("prior", 3) is None and not context.records


def test_beams_stand_next_to_each_other():
    context, key, _ = begun()
    context.put("task_id", torch.tensor([4, 5, 6]), key)
    assert context.get("task_id", 6).tolist() == [4, 4, 5, 5, 6, 6]


@pytest.mark.parametrize("rows", [1, 2, 4, 5])
def test_a_number_of_rows_that_is_no_multiple_raises(rows):
    context, key, _ = begun()
    context.put("task_id", torch.tensor([4, 5, 6]), key)
    with pytest.raises(ValueError, match=f"'task_id' has 3 rows, the layer sees {rows}: begin the batch anew"):
        context.get("task_id", rows)


def test_recomputation_sees_the_facts_of_its_own_forward_and_records_nothing():
    context, key, ids = begun()
    first, second = torch.randn(3, 4), torch.randn(3, 4)
    context.put("prior", first, key)
    _, recompute = context.checkpoint_fns()
    context.put("prior", second, context.begin(ids + 1, torch.ones_like(ids)))
    context.recording = True
    with recompute:
        assert context.get("prior", 3) is first
        context.record("slot", Routing(torch.ones(3, 1, 4)))
    assert context.get("prior", 3) is second and not context.records and context.recording


def test_recomputation_keeps_the_adapters_off_where_they_were_off():
    context, _, _ = begun()
    with context.disabled():
        _, recompute = context.checkpoint_fns()
    with recompute:
        assert not context.enabled
    assert context.enabled


def test_recomputation_leaves_no_terms():
    """The loss has its own already; those of a recomputation would keep its activations alive."""
    context, _, _ = begun()
    context.add_term("contrast", "slot", torch.ones(3))
    _, recompute = context.checkpoint_fns()
    with recompute:
        context.add_term("contrast", "slot", torch.zeros(3))
        context.add_term("contrast", "other", torch.zeros(3))
    (kept,) = context.terms("contrast").values()
    assert torch.equal(kept, torch.ones(3))


def test_terms_are_kept_by_name_and_slot_until_the_next_batch():
    context, _, ids = begun()
    context.add_term("contrast", "one", torch.tensor(1.0))
    context.add_term("contrast", "one", torch.tensor(2.0))
    context.add_term("contrast", "two", torch.tensor(3.0))
    context.add_term("contrast", "three", None)
    context.add_term("rank_cost", "one", torch.tensor(4.0))
    assert [term.item() for term in context.terms("contrast").values()] == [2.0, 3.0]
    assert [term.item() for term in context.terms("rank_cost").values()] == [4.0]
    assert context.terms("other") == {}
    context.begin(ids, torch.ones_like(ids))
    assert context.terms("contrast") == {}


def test_what_needs_no_gradient_is_made_once_per_batch_and_slot():
    context, _, ids = begun()
    made = []

    def make():
        made.append(torch.rand(()))
        return made[-1]

    with torch.no_grad():
        assert context.hold("one", 2, make) is context.hold("one", 2, make)
        assert context.hold("two", 2, make) is made[1]
        assert context.hold("two", 4, make) is made[2] and context.hold("two", 4, make) is made[2]
        assert context.hold("two", 2, make) is made[3], "of another number of rows there is one at a time"
        context.begin(ids, torch.ones_like(ids))
        assert context.hold("one", 2, make) is made[4]
    assert context.hold("one", 2, make) is made[5] and context.hold("one", 2, make) is made[6]


def test_a_new_fact_drops_what_was_held():
    context, key, _ = begun()
    with torch.no_grad():
        before = context.hold("one", 2, lambda: torch.zeros(()))
        context.put("task_id", torch.tensor([1, 0, 1]), key)
        assert context.hold("one", 2, lambda: torch.ones(())) is not before


def test_disabled_ends_with_its_block_even_after_an_error():
    context = RoutingContext()
    with pytest.raises(KeyError), context.disabled():
        assert not context.enabled
        raise KeyError
    assert context.enabled


# ---- the model's own calls -------------------------------------------------------------------------------------------


def trex(kind):
    return come_alive(build(TRex, kind, r1=2, r2=3), random_batch(kind=kind), scale=1.0)


def prompts(rows, kind, **options):
    options = {"side": "left" if kind == "causal" else "right"} | options
    return batch_of(rows, [[]] * len(rows), "classifier", **options) | {"task_id": torch.zeros(len(rows)).long()}


def generate(module, batch, **options):
    """Returns seven new tokens of every row, as lists."""
    module.begin(batch)
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    ids = module.model.generate(
        **inputs, max_new_tokens=7, min_new_tokens=7, do_sample=False, pad_token_id=0, **options
    )
    return ids[:, -7:].tolist()


@pytest.mark.parametrize("kind", ["causal", "seq2seq", "classifier"])
def test_a_model_called_with_another_batch_raises(kind):
    module, batch, other = trex(kind), random_batch(kind=kind, seed=3), random_batch(kind=kind, seed=4)
    module.begin(batch)
    inputs = {"input_ids": other["input_ids"], "attention_mask": other["attention_mask"]}
    if kind == "seq2seq":
        inputs["labels"] = other["labels"]
    with pytest.raises(ValueError, match="called with other rows than its routing facts"):
        module.model(**inputs)


@pytest.mark.parametrize("kind", GENERATORS)
@pytest.mark.parametrize("beams", [1, 3])
def test_generating_for_another_batch_raises(kind, beams):
    module, batch, other = trex(kind), random_batch(kind=kind, seed=3), random_batch(kind=kind, seed=4)
    module.begin(batch)
    inputs = {"input_ids": other["input_ids"], "attention_mask": other["attention_mask"]}
    with pytest.raises(ValueError, match="called with other rows than its routing facts"):
        module.model.generate(**inputs, max_new_tokens=2, num_beams=beams)


def test_the_same_rows_in_other_tensors_are_let_through():
    module = trex("causal")
    module.begin(prompts(PROMPTS, "causal", side="right"))
    again = prompts(PROMPTS, "causal", side="right", extra=2)
    module.model(input_ids=again["input_ids"], attention_mask=again["attention_mask"])


def test_a_disabled_model_takes_any_batch():
    module, other = trex("causal"), random_batch(seed=4)
    module.begin(random_batch(seed=3))
    with module.context.disabled():
        module.model(input_ids=other["input_ids"], attention_mask=other["attention_mask"])


@pytest.mark.parametrize("kind", GENERATORS)
@pytest.mark.parametrize("beams", [1, 3])
def test_a_mixed_batch_generates_what_each_row_generates_alone(kind, beams):
    module = trex(kind)
    together = generate(module, prompts(PROMPTS, kind), num_beams=beams)
    alone = [generate(module, prompts([prompt], kind), num_beams=beams)[0] for prompt in PROMPTS]
    assert together == alone
    with module.context.disabled():
        bare = generate(module, prompts(PROMPTS, kind), num_beams=beams)
    assert together != bare and len({tuple(row) for row in together}) == 3


@pytest.mark.parametrize("kind", GENERATORS)
@pytest.mark.parametrize("beams", [1, 3])
def test_the_prior_decides_what_is_generated(kind, beams):
    """Else the test above could not see a prior that went to the wrong row or beam."""
    module = trex(kind)
    batch = prompts(PROMPTS, kind)
    expected = generate(module, batch, num_beams=beams)
    own = module.prior.forward
    module.prior.forward = lambda batch: own(batch).roll(1, 0)
    moved = generate(module, batch, num_beams=beams)
    assert sum(one != other for one, other in zip(expected, moved, strict=True)) >= 2


@pytest.mark.parametrize("kind", GENERATORS)
@pytest.mark.parametrize("beams", [1, 3])
def test_a_cache_changes_nothing_that_is_generated(kind, beams):
    module, batch = trex(kind), prompts(PROMPTS, kind)
    cached = generate(module, batch, num_beams=beams, use_cache=True)
    assert generate(module, batch, num_beams=beams, use_cache=False) == cached
