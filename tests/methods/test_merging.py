"""Merging a whole module: which methods, which tasks, what it costs, what is refused."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from moe_peft.checkpoint import describe
from moe_peft.layers.adapted import AdaptedLinear
from moe_peft.methods.lora import LoRA
from moe_peft.methods.more import MoRE
from moe_peft.methods.trex import TRex
from tests.tiny import build, come_alive, output, random_batch, randomise

KINDS = ["causal", "seq2seq", "classifier"]
SCALINGS = ["rank_over_r", "paper", "none", "code"]


def alive(method, kind="causal", **arguments):
    """A method whose every tensor acts, in eval mode, and a batch."""
    batch = random_batch(kind=kind)
    return come_alive(build(method, kind, **arguments), batch, scale=0.1).eval(), batch


def of_task(batch, task):
    """The batch with all rows of one task."""
    return {**batch, "task_id": torch.full_like(batch["task_id"], task)}


def weights(module):
    return {slot: layer.base.weight for slot, layer in module.adapted.items()}


def close(one, other, tolerance=1e-5):
    torch.testing.assert_close(one, other, rtol=0, atol=tolerance * max(1.0, other.abs().max().item()))


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scaling", SCALINGS)
def test_a_merged_task_gives_what_its_routing_gives(kind, scaling):
    with torch.enable_grad():
        module, batch = alive(MoRE, kind, rank=5, scaling=scaling)
    assert all(len(set(ranks)) >= 3 for ranks in zip(*module.rank_table().values(), strict=True))
    before = {slot: weight.clone() for slot, weight in weights(module).items()}
    routed = [output(module, of_task(batch, task)) for task in (0, 1)]
    assert (routed[0] - routed[1]).abs().max() > 1e-2
    for task, name in enumerate(("tone", "topic")):
        module.merge(name)
        close(output(module, of_task(batch, task)), routed[task])
        assert not torch.equal(output(module, of_task(batch, task)), routed[task])  # another order of sums
        module.unmerge()
        assert all(torch.equal(weight, before[slot]) for slot, weight in weights(module).items())
        assert torch.equal(output(module, of_task(batch, task)), routed[task])


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_lora_merges_for_all_tasks_at_once(kind):
    with torch.enable_grad():
        module, batch = alive(LoRA, kind)
    own = output(module, batch)
    with module.context.disabled():
        bare = output(module, batch)
    module.merge()
    close(output(module, batch), own)
    with module.context.disabled():
        assert torch.equal(output(module, batch), bare)
    module.unmerge()
    module.merge("topic")  # a name does no harm and narrows nothing
    close(output(module, batch), own)


def test_merging_again_and_unmerging_twice_are_refused():
    module, _ = alive(MoRE, rank=3)
    with pytest.raises(ValueError, match="^the model is not merged"):
        module.unmerge()
    module.merge("tone")
    with pytest.raises(ValueError, match=r"^task 'tone' is merged already: call unmerge\(\) before merging again$"):
        module.merge("topic")
    module.unmerge()
    with pytest.raises(ValueError, match="not merged"):
        module.unmerge()


@pytest.mark.parametrize("task", ["tune", "", 2, -1])
def test_a_task_that_there_is_not_is_refused(task):
    module, _ = alive(MoRE, rank=3)
    with pytest.raises(ValueError, match=r"^task: there is no task .*; use one of tone \(0\), topic \(1\)$"):
        module.merge(task)
    assert not any(layer.merged for layer in module.adapted.values())


def test_a_method_of_task_dependent_cores_needs_a_task():
    module, _ = alive(MoRE, rank=3)
    with pytest.raises(ValueError, match="^task: MoRE adapts each task in its own way; name one of tone, topic$"):
        module.merge()


@pytest.mark.parametrize("task", [None, "tone"])
def test_a_method_that_reads_the_input_cannot_be_merged(task):
    module, batch = alive(TRex, r1=2, r2=3)
    own = output(module, batch)
    with pytest.raises(ValueError, match="^TRex cannot be merged or exported as a LoRA: JointRouter reads its input"):
        module.merge(task)
    assert torch.equal(output(module, batch), own)


@torch.no_grad()
def test_rows_of_another_task_are_refused_while_one_is_merged():
    with torch.enable_grad():
        module, batch = alive(MoRE, rank=3)
    module.merge("topic")
    refused = r"^a batch with rows of task 'tone' while task 'topic' is merged: call unmerge\(\) first$"
    for wrong in (batch, of_task(batch, 0)):
        with pytest.raises(ValueError, match=refused):
            module(wrong)
    module(of_task(batch, 1))
    with module.context.disabled():
        module(batch)  # the bare base serves every task
    module.unmerge()
    module(batch)


def test_an_error_midway_leaves_nothing_merged(monkeypatch):
    module, batch = alive(LoRA)
    before, own = weights(module), output(module, batch)
    last = list(module.adapted.values())[-1]
    merge = AdaptedLinear.merge

    def fails(layer, core=None, task=0):
        if layer is last:
            raise MemoryError("no room")
        merge(layer, core, task)

    monkeypatch.setattr(AdaptedLinear, "merge", fails)
    with pytest.raises(MemoryError):
        module.merge()
    assert all(weight is before[slot] for slot, weight in weights(module).items())
    assert torch.equal(output(module, batch), own)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", [LoRA, MoRE])
def test_a_checkpoint_saved_while_merged_is_the_one_saved_before(method, kind):
    module, _ = alive(method, kind)

    def saved():
        checkpoint = {"state_dict": module.state_dict()}
        module.on_save_checkpoint(checkpoint)
        return checkpoint

    before, about = saved(), describe(module)
    module.merge("tone")
    after = saved()
    assert after["state_dict"].keys() == before["state_dict"].keys() and len(before["state_dict"]) > 10
    assert all(torch.equal(value, before["state_dict"][name]) for name, value in after["state_dict"].items())
    assert after["moe_peft"] == before["moe_peft"] == about


def test_loading_into_a_merged_module_is_refused():
    module, _ = alive(LoRA)
    state = {name: value.clone() for name, value in module.adapter_state().items()}
    module.merge()
    with pytest.raises(ValueError, match=r"merged model would not move it: call unmerge\(\) first$"):
        module.load_state_dict(state)


def test_training_while_merged_is_refused():
    module, batch = alive(LoRA)
    module.merge()
    module.train()
    with pytest.raises(ValueError, match=r"is merged, .* call unmerge\(\) before training"):
        module(batch)


@torch.no_grad()
def flops(module, batch):
    """Floating-point operations of one forward, as torch counts them."""
    with FlopCounterMode(display=False) as counter:
        output(module, batch)
    return counter.get_total_flops()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", [LoRA, MoRE])
def test_a_merged_forward_has_exactly_the_bare_bases_flops(method, kind):
    module, batch = alive(method, kind)
    batch = of_task(batch, 0)
    with module.context.disabled():
        bare = flops(module, batch)
    adapted = flops(module, batch)
    module.merge("tone")
    assert flops(module, batch) == bare < adapted


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [2, 7])
def test_unmerged_more_costs_loras_flops_and_a_selector_that_no_token_enters(kind, rows):
    """A linear's selector: W e for all tasks and their mean (2 (T + 1) N d) and p̃ M (2 T N R), once per batch."""
    rank, tasks, width = 4, 2, 6
    batch = random_batch(rows, kind)
    lora, more = build(LoRA, kind, rank=rank), build(MoRE, kind, rank=rank, embedding_dim=width)
    randomise(lora), randomise(more)
    selector = 2 * (tasks + 1) * rank * width + 2 * tasks * rank * rank
    assert flops(more.eval(), batch) - flops(lora.eval(), batch) == len(more.adapted) * selector
