"""What a faithful MoRE shows (arXiv 2505.22694 and its official code): the update, its gradients, shapes and errors.

Merging, exports, checkpoints and runs have files of their own. Shapes: B batch, r ranks, N experts, T tasks.
"""

import peft
import pytest
import torch
from torch import nn

from moe_peft.methods.lora import LoRA
from moe_peft.methods.more import MoRE
from tests.methods.tiny_more import KINDS, SCALINGS, R, agree, answer, batch_for, more, of_task, rank_of, tasks_of
from tests.tiny import TASKS, batch_of, build, come_alive, output, randomise, tiny_backbone

# ---- 1-3: plain LoRA of the first k ranks ----------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scaling", SCALINGS)
def test_01_a_forced_rank_is_the_base_plus_the_first_k_ranks(kind, scaling):
    """Oracle: the bare model with W + s c_k sum_{j <= k} s_j b_j a_j in every linear's place."""
    with torch.enable_grad():
        module, batch = more(kind, alpha=3.0, scaling=scaling)
    for k in range(1, R + 1):
        rank_of(module, [k, k])
        torch.manual_seed(0)
        plain = tiny_backbone(kind).load().double()
        for slot, layer in module.adapted.items():
            c = {"rank_over_r": k / R, "paper": k / len(TASKS), "none": 1, "code": 1}[scaling]
            for j in range(k):
                s = ((j + 1) / R) ** 2 if scaling == "code" else 1
                term = torch.outer(layer.factors.B[:, j], layer.factors.A[j])
                plain.get_submodule(slot).weight += 3.0 / R * c * s * term
        expected, found = answer(plain, batch), output(module, batch)
        agree(found, expected)
        with module.context.disabled():
            assert (found - output(module, batch)).abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", range(1, R + 1))
def test_01_a_forced_rank_is_hf_pefts_lora_of_that_rank(kind, k):
    module, batch = more(kind, alpha=3.0, scaling="none")
    rank_of(module, [k, k])
    torch.manual_seed(0)
    config = peft.LoraConfig(r=k, lora_alpha=3.0 * k / R, target_modules=list(module.adapted), lora_dropout=0.0)
    theirs = peft.get_peft_model(tiny_backbone(kind).load(), config).eval().get_base_model().double()
    for slot, layer in module.adapted.items():
        other = theirs.get_submodule(slot)
        other.lora_A.default.weight.data.copy_(layer.factors.A[:k])
        other.lora_B.default.weight.data.copy_(layer.factors.B[:, :k])
    given, expected = output(module, batch), answer(theirs, batch)
    agree(given, expected)
    upstream = torch.linspace(-1, 1, given.numel(), dtype=given.dtype).view_as(given)
    given.backward(upstream), expected.backward(upstream)
    for slot, layer in module.adapted.items():
        other = theirs.get_submodule(slot)
        a, b = layer.factors.A.grad, layer.factors.B.grad
        agree(a[:k], other.lora_A.default.weight.grad)
        agree(b[:, :k], other.lora_B.default.weight.grad)
        assert a[:k].any() and b[:, :k].any() and not a[k:].any() and not b[:, k:].any()


@pytest.mark.parametrize("kind", KINDS)
def test_01_the_full_rank_is_ordinary_lora(kind):
    module = build(MoRE, kind, rank=R, scaling="none", selector="fixed").double()
    randomise(module)
    batch = batch_for(module, kind)
    lora = build(LoRA, kind, rank=R, alpha=module.alpha).double()
    for slot, layer in lora.adapted.items():
        layer.factors.load_state_dict(module.adapted[slot].factors.state_dict())
    found = output(module, batch)
    agree(found, output(lora, batch), 1e-12)
    with module.context.disabled():
        assert (found - output(module, batch)).abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("selector", ["full", "winner"])
def test_02_a_batch_leaves_the_ranks_above_its_tasks_without_gradient(kind, selector):
    module, batch = more(kind, selector=selector)
    tables = module.rank_table()
    assert len({rank for ranks in tables.values() for rank in ranks}) > 2
    for task in (0, 1):
        module.zero_grad(set_to_none=True)
        module(of_task(batch, task)).sum().backward()
        for slot, layer in module.adapted.items():
            k = tables[slot][task]
            assert not layer.factors.A.grad[k:].any() and not layer.factors.B.grad[:, k:].any()
            assert (layer.factors.A.grad[:k].abs().amax(1) > 0).all()
            assert (layer.factors.B.grad[:, :k].abs().amax(0) > 0).all()


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("selector", ["full", "winner", "random"])
def test_03_the_update_is_zero_at_the_start_to_the_bit_for_every_task_and_rank(kind, selector):
    module = build(MoRE, kind, rank=R, selector=selector)
    batch = batch_for(module, kind)
    with module.context.disabled():
        bare = output(module, batch)
    assert torch.equal(output(module, batch), bare)
    for task in (0, 1):
        for k in range(1, R + 1):
            rank_of(module, [k, k])
            assert torch.equal(output(module, of_task(batch, task)), bare)
    for layer in module.adapted.values():
        nn.init.normal_(layer.factors.B)
    assert (output(module, batch) - bare).abs().max() > 1e-3


# ---- 5: who gets a gradient ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("selector", ["full", "winner"])
def test_05_the_selector_has_a_gradient_as_soon_as_b_is_not_zero(kind, selector, scaling):
    """In the encoder and in the decoder, self- and cross-attention alike: come_alive looks at every tensor."""
    module = build(MoRE, kind, rank=R, selector=selector, scaling=scaling)
    batch = batch_for(module, kind)
    module(batch).sum().backward()
    own = [name for name, p in module.named_parameters() if ".router." in name and p.requires_grad]
    assert len(own) == 3 * len(module.adapted)
    assert not any(module.get_parameter(name).grad.any() for name in own)
    assert all(layer.factors.B.grad.any() for layer in module.adapted.values())
    module.zero_grad(set_to_none=True)
    come_alive(module, batch)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("selector", ["full", "winner"])
def test_05_the_task_loss_reaches_the_embeddings_of_the_batchs_tasks_alone(kind, selector):
    module = build(MoRE, kind, rank=R, selector=selector, tasks=tasks_of(5))
    batch = batch_for(module, kind, rows=5)
    come_alive(module, batch)
    batch["task_id"] = torch.tensor([1, 3, 3, 1, 3])
    module(batch).sum().backward()
    for slot, layer in module.adapted.items():
        reached = layer.router.embedding.weight.grad.abs().amax(1) > 0
        assert reached.tolist() == [False, True, False, True, False], slot


def test_05_the_shared_table_likewise():
    module = build(MoRE, rank=R, embedding_dim=6, tasks=tasks_of(3))
    batch = batch_for(module, rows=4)
    come_alive(module, batch)
    module(of_task(batch, 2)).sum().backward()
    assert (module.task_embedding.weight.grad.abs().amax(1) > 0).tolist() == [False, False, True]


@pytest.mark.parametrize("selector", ["random", "fixed"])
def test_05_a_table_that_is_not_learned_has_no_gate_and_its_embeddings_stay(selector):
    """Their gradient is there and zero, so that data-parallel processes agree on who takes part."""
    module = build(MoRE, rank=R, selector=selector)
    randomise(module)
    module(batch_for(module)).sum().backward()
    trained = {name.rsplit(".", 2)[-2] for name, p in module.named_parameters() if p.requires_grad}
    assert trained == {"factors", "embedding"}
    assert all(not s.embedding.weight.grad.any() for s in module.selectors().values())


# ---- 14: mixed batches -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"selector": "winner", "scaling": "code"}, {"embedding_dim": 6}], ids=str)
def test_14_a_mixed_batch_is_its_tasks_batches(kind, options):
    """Outputs row by row, and the gradients in their sum."""
    module, batch = more(kind, tasks=tasks_of(3), **options)
    tolerance = 1e-5 if module.heads is not None else 1e-9  # heads are fp32
    mixed, losses = output(module, batch), module(batch)
    losses.sum().backward()
    gradients = {name: p.grad for name, p in module.named_parameters() if p.requires_grad}
    module.zero_grad(set_to_none=True)
    others = []
    for task in range(3):
        rows = (batch["task_id"] == task).nonzero().flatten().tolist()
        one = {name: value[rows] if torch.is_tensor(value) else value for name, value in batch.items()}
        agree(output(module, one), mixed[rows])
        alone = module(one)
        agree(alone, losses[rows], tolerance)
        alone.sum().backward()
        others.append(output(module, of_task(batch, (task + 1) % 3))[rows] - mixed[rows])
    assert all(other.abs().max() > 1e-3 for other in others), "the tasks do not differ"
    for name, gradient in gradients.items():
        assert gradient.abs().max() > 0, name
        agree(module.get_parameter(name).grad, gradient, tolerance * max(1.0, gradient.abs().max().item()))


PROMPTS, ANSWERS = [[5, 6, 7, 8], [9, 10, 11, 12, 13, 14, 15], [20, 21]], [[30, 31], [32], [33, 34, 35]]


def test_14_a_row_depends_on_neither_batch_mates_nor_padding():
    module, _ = more()

    def rows(*which, **options):
        batch = batch_of([PROMPTS[i] for i in which], [ANSWERS[i] for i in which], **options)
        batch["task_id"] = torch.tensor([i % 2 for i in which])
        return module(batch)

    together = rows(0, 1, 2)
    agree(rows(0, 1, 2, extra=3), together, 1e-6)
    agree(rows(2, 0, 1), together[[2, 0, 1]], 1e-6)
    for i in range(3):
        agree(rows(i), together[[i]], 1e-6)
