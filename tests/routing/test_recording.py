"""Watching a module: real tokens only, first routings only, every kind of router, and nothing changed by it."""

import pytest
import torch

from moe_peft.context import Routing
from moe_peft.data.collate import Collator
from moe_peft.data.encoding import EncodedRow
from moe_peft.layers.adapted import AdaptedLinear
from moe_peft.layers.factors import DenseFactors
from moe_peft.layers.routers import Router
from moe_peft.methods.base import MultitaskModule
from moe_peft.methods.lora import LoRA
from moe_peft.methods.more import MoRE
from moe_peft.methods.scoring import option_scores
from moe_peft.methods.trex import TRex
from moe_peft.routing.recording import Place, measured, observer, record, sample, share
from moe_peft.routing.sums import RoutingSums
from tests.methods.test_gates import METHODS
from tests.methods.tiny_tt import moe, rows_for
from tests.tiny import TASKS, build, come_alive, random_batch, tiny_backbone


class Coin(Router):
    """A router that anybody might write: two experts of one rank each, told apart by the input's sign."""

    def forward(self, x, h, scores, context, slot):
        heads = (x.sum(-1, keepdim=True) > 0).float()
        weights = torch.cat([heads, 1 - heads], -1)
        context.record(slot, Routing(weights))
        return weights


class Coins(MultitaskModule):
    """A method with such a router that says nothing else of it."""

    def adapt(self, base, slot):
        factors = DenseFactors(base.in_features, base.out_features, 2, 2)
        return AdaptedLinear(base, factors, Coin(), 1.0, 0.0, self.context, slot)


class Data:
    """Encoded rows of tiny tasks, 7 of the first and 5 of the second, in the way of a data module."""

    def __init__(self, kind="causal"):
        self.collator = Collator(kind, pad_id=0)
        self.kind = kind

    def rows(self, split):
        generator = torch.Generator().manual_seed(len(split))

        def row(at, task):
            sizes = 4 + at % 5, 1 + at % 3
            prompt, answer = (torch.randint(3, 97, (size,), generator=generator).tolist() for size in sizes)
            return EncodedRow(f"{TASKS[task].name}/{at}", task, {}, str(at), prompt, answer, [], at % 2, 0)

        return [row(at, 0) for at in range(7)] + [row(at, 1) for at in range(5)]


def watched(module, batch, run=None):
    """The sums of one batch."""
    sums = RoutingSums(len(module.specs))
    module.context.observe(observer(module, batch, sums))
    with torch.no_grad():
        run() if run is not None else module(batch)
    assert not module.context.records, "what is shown is not kept"
    module.context.observe(None)
    return sums


def tokens(sums, layer):
    """How many tokens each task had."""
    table = sums.layers[layer]
    return table[:, table.shape[1] // 2 : -1].sum(1).tolist()


def alive(method=TRex, kind="causal", **options):
    return come_alive(build(method, kind, **options), random_batch(kind=kind)).eval()


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("training", [True, False])
def test_watching_changes_no_bit(name, training):
    method, options = METHODS[name]
    module, batch = alive(method, **options).train(training), random_batch()

    def losses():
        module.zero_grad()
        loss = module(batch)
        loss.sum().backward()
        return [loss.detach(), *(own.grad.clone() for own in module.parameters() if own.grad is not None)]

    plain, sums = losses(), RoutingSums(2)
    module.context.observe(observer(module, batch, sums))
    seen = losses()
    assert len(plain) > 10 and all(torch.equal(one, two) for one, two in zip(plain, seen, strict=True))
    assert set(sums.layers) == set(module.adapted)
    with torch.no_grad():
        observed = module(batch)
        module.context.observe(None)
        assert torch.equal(observed, module(batch)), "nor of the way that inference takes"


def test_the_weights_are_those_of_the_routers_own_forward():
    module, batch = alive(r1=2, r2=3), random_batch()
    sums = watched(module, batch)
    module.context.recording = True
    for layer in module.adapted.values():
        layer.router.gate = lambda x, context, slot: None
    with torch.no_grad():
        module(batch)
    for slot, routing in module.context.records.items():
        expected = RoutingSums(2)
        expected.add(slot, routing.weights, batch["task_id"], batch["attention_mask"].bool())
        torch.testing.assert_close(sums.layers[slot], expected.layers[slot], rtol=1e-5, atol=1e-5)


def test_padding_does_not_show():
    module = alive(r1=2, r2=3)
    narrow, wide = random_batch(), random_batch()
    for name, filler in (("input_ids", 5), ("attention_mask", 0), ("prompt_mask", 0), ("labels", -100)):
        wide[name] = torch.nn.functional.pad(wide[name], (3, 0), value=filler)
    one, two = watched(module, narrow), watched(module, wide)
    for slot in module.adapted:
        torch.testing.assert_close(one.layers[slot], two.layers[slot], rtol=1e-5, atol=1e-5)


def test_a_decoders_tokens_are_those_of_the_answer():
    module, batch = alive(kind="seq2seq", r1=2, r2=3), random_batch(kind="seq2seq")
    sums = watched(module, batch)
    own = [batch["task_id"] == task for task in range(2)]
    prompts = [float(batch["attention_mask"][rows].sum()) for rows in own]
    answers = [float((batch["labels"][rows] >= 0).sum()) for rows in own]
    assert prompts != answers
    block = "decoder.block.0.layer"
    assert tokens(sums, "encoder.block.0.layer.0.SelfAttention.q") == prompts
    assert tokens(sums, f"{block}.0.SelfAttention.q") == answers
    assert tokens(sums, f"{block}.1.EncDecAttention.q") == answers
    assert tokens(sums, f"{block}.1.EncDecAttention.k") == prompts, "cross-attention's keys are the encoder's states"


def test_packed_options_count_all_their_tokens():
    module = alive(r1=2, r2=3)
    row = EncodedRow("tone/0", 0, {"choices": ["a", "b"]}, "", [5, 6, 7], [], [[8, 9], [10]], 0, 0)
    batch = Collator("causal", pad_id=0).evaluate([row])
    assert "option_of" in batch

    def score():
        module.begin(batch)
        option_scores(module.backbone, module.built(), batch)

    sums = watched(module, batch, score)
    assert all(tokens(sums, slot) == [6.0, 0.0] for slot in module.adapted)


@pytest.mark.parametrize("beams", [1, 3])
def test_of_a_generation_the_prefill_counts(beams):
    module, batch = alive(r1=2, r2=3), random_batch()

    def generate():
        module.begin(batch)
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        module.model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, num_beams=beams, do_sample=False)

    sums = watched(module, batch, generate)
    prompts = [float(batch["attention_mask"][batch["task_id"] == task].sum()) for task in range(2)]
    assert all(tokens(sums, slot) == [beams * count for count in prompts] for slot in module.adapted)


def test_recomputed_blocks_count_once():
    batch = random_batch()
    found = []
    for checkpointing in (False, True):
        backbone = tiny_backbone(gradient_checkpointing=checkpointing)
        module = come_alive(build(TRex, backbone=backbone, r1=2, r2=3), batch).train()
        sums = RoutingSums(2)
        module.context.observe(observer(module, batch, sums))
        module(batch).sum().backward()
        found.append(sums.layers)
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(table, found[1][slot]) for slot, table in found[0].items())


def test_a_router_of_ones_own_needs_nothing_more():
    module, data = alive(Coins), Data()
    found = record(module, data, "test", 100, Place())
    uses = measured(module, found.sums)
    assert module.routes and set(uses) == set(module.adapted)
    assert all(use.experts == ["0", "1"] and use.entropy == 0 for use in uses.values())
    assert {tuple(use.tokens) for use in uses.values()} == {
        tuple(sum(len(row.prompt + row.answer) for row in data.rows("test") if row.task_id == task) for task in (0, 1))
    }


def test_experts_are_named_by_their_method():
    assert build(TRex, r1=2, r2=2).expert_names("any", 4) == ["0,0", "0,1", "1,0", "1,1"]
    assert build(TRex, r1=2, r2=2, mode="rank1").expert_names("any", 2) == ["0", "1"]
    assert build(MoRE, rank=4, experts=2).expert_names("any", 2) == ["r2", "r4"]
    mixture = moe()
    assert mixture.expert_names("all", 4) == ["task0", "task1", "task2", "none"]
    assert mixture.expert_names("all", 3) == ["task0", "task1", "task2"]
    assert not build(LoRA).routes


@pytest.mark.parametrize("refused", [False, True])
def test_a_mixtures_choice_is_one_for_all_layers(refused):
    module, batch = moe(), rows_for()
    with torch.no_grad():
        scores = module.scores(batch)
        if refused:
            sure = module.router.confidence(scores)
            module.null_below.fill_(sure.sort().values[2])
    sums = watched(module, batch)
    assert list(sums.layers) == ["all"]
    p = scores.softmax(-1).double()
    if refused:
        p = torch.nn.functional.pad(p, (0, 1))
        p[sure < module.null_below] = torch.tensor([0.0, 0, 0, 1]).double()
    expected = torch.stack([p[batch["task_id"] == task].sum(0) for task in range(3)])
    torch.testing.assert_close(sums.layers["all"][:, : p.shape[1]], expected, rtol=1e-5, atol=1e-6)


def test_two_processes_see_together_what_one_sees():
    module, data = alive(r1=2, r2=3), Data()
    whole = record(module, data, "test", 100, Place())
    both = RoutingSums(2)
    batches = [list(share(data, "test", 100, Place(5, rank))) for rank in range(5)]
    assert [[len(counted) for _, counted in own] for own in batches] == [[3]] * 5, "12 rows and 3 that fill up"
    for batch, counted in (each for own in batches for each in own):
        sums = RoutingSums(2)
        module.context.observe(observer(module, batch, sums, counted))
        with torch.no_grad():
            module(batch)
        both.update(sums)
    for slot, table in whole.sums.layers.items():
        torch.testing.assert_close(both.layers[slot], table, rtol=1e-5, atol=1e-5)


def test_a_recording_leaves_mode_and_random_numbers_alone():
    module = alive(Coins).train()
    for layer in module.adapted.values():
        layer.router.register_forward_pre_hook(lambda *_: (torch.rand(1), None)[1])  # a router that draws
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    record(module, Data(), "test", 100, Place())
    assert torch.equal(torch.rand(2), expected)
    assert module.training and not module.context.recording and all(own.training for own in module.adapted.values())


def test_a_sample_is_spread_over_every_task():
    rows = Data().rows("test")
    assert [row.row_id for row in sample(rows, 3)] == [f"tone/{at}" for at in (0, 2, 4)] + [
        f"topic/{at}" for at in (0, 1, 3)
    ]
    assert sample(rows, 100) == rows


def test_prompts_are_counted_by_the_cluster_they_are_most_similar_to():
    module, data = alive(r1=2, r2=3), Data()
    found = record(module, data, "test", 100, Place(), mapped=True)
    expected = {}
    vectors = {0: [], 1: []}
    for row in data.rows("test"):
        embedding = module.prior.embedder(data.collator.prompts([row]))[0]
        nearest = int((module.prior.centroids @ embedding).argmax())
        expected[row.task_id, nearest] = expected.get((row.task_id, nearest), 0) + 1
        vectors[row.task_id].append(embedding.double())
    assert found.nearest == expected and found.clusters == 6 and len(expected) > 2
    for task, own in vectors.items():
        torch.testing.assert_close(found.vectors[task][:-1] / len(own), torch.stack(own).mean(0), rtol=1e-5, atol=1e-6)
    assert [name for name, kind, _ in found.landmarks if kind == "cluster"] == [str(k) for k in range(6)]
    assert {slot: gates[0] for slot, gates in found.gates.items()} == {
        slot: layer.router.gates()[0].item() for slot, layer in module.adapted.items()
    }


def test_the_task_map_of_more_weighs_all_layers_alike():
    module = alive(MoRE, rank=4)
    (one, other) = (vector for _, _, vector in module.landmarks())
    cosines = [
        torch.nn.functional.cosine_similarity(*layer.router.task_embeddings(), dim=0).item()
        for layer in module.adapted.values()
    ]
    assert (one @ other).item() == pytest.approx(sum(cosines), abs=1e-4)
    assert (one @ one).item() == pytest.approx(len(cosines))
