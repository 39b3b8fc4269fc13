"""The contrastive task-embedding loss: its value from hooked inputs, its masks, its gradients, what is refused."""

import math

import pytest
import torch

from moe_peft.batch import IGNORE_INDEX
from moe_peft.callbacks.task_contrast import TaskContrast
from moe_peft.methods.lora import LoRA
from moe_peft.methods.trex import TRex
from tests.callbacks.tiny_contrast import (
    KINDS,
    expected_losses,
    inputs_of,
    mean_of,
    more,
    term,
    tokens_that_count,
    watch,
)
from tests.tiny import batch_of, build, random_batch

REPRESENTATIONS = ["first_token", "mean", "last_token"]
PROMPTS, ANSWERS = [[5, 6, 7, 8], [9, 10, 11, 12, 13], [20, 21, 22], [31, 32]], [[40, 41], [42], [43, 44, 45], [46]]
EQUAL = [[50, 51, 52, 53, 54], [55, 56], [57, 58, 59], [60]]
"""Answers whose longest has as many tokens as the longest prompt: a wrong mask would still fit its tensor."""


# ---- the value -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("answers", [ANSWERS, EQUAL], ids=["unequal", "equal"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("how", REPRESENTATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_the_cross_entropy_of_cosines(kind, how, side, answers):
    batch = batch_of(PROMPTS, answers, kind, side)
    module = more(kind, batch)
    expected = mean_of(expected_losses(module, batch, kind, how))
    assert term(module, batch, representation=how).item() == pytest.approx(expected, rel=1e-4)


def test_the_source_and_target_lengths_of_that_test_are_equal():
    batch = batch_of(PROMPTS, EQUAL, "seq2seq", "right")
    assert batch["labels"].shape == batch["input_ids"].shape
    assert not torch.equal(batch["prompt_mask"], batch["labels"] != IGNORE_INDEX)


@pytest.mark.parametrize("kind", ["seq2seq", "classifier"])
def test_encoder_only_leaves_the_decoder_out(kind):
    batch = random_batch(kind=kind)
    module = more(kind, batch)
    found = term(module, batch, layers="encoder")
    losses = expected_losses(module, batch, kind, "mean")
    encoder = {slot: loss for slot, loss in losses.items() if kind != "seq2seq" or slot.startswith("encoder.")}
    assert found.item() == pytest.approx(mean_of(encoder), rel=1e-4)
    found.backward()
    for slot, selector in module.selectors().items():
        gradient = selector.embedding.weight.grad
        assert (gradient is not None and bool(gradient.any())) == (slot in encoder), slot


def test_encoder_only_on_a_decoder_is_refused():
    with pytest.raises(ValueError, match="^TaskContrast: layers 'encoder', but a decoder has none .* use layers: all"):
        TaskContrast(layers="encoder").on_fit_start(None, more("causal"))


def test_encoder_only_without_an_adapted_linear_there_is_refused():
    module = more("seq2seq", targets=r"decoder\..*")
    with pytest.raises(ValueError, match="^TaskContrast: no linear of the encoder is adapted; set layers: all"):
        TaskContrast(layers="encoder").on_fit_start(None, module)


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_log_t_when_all_embeddings_coincide(kind):
    batch = random_batch(kind=kind)
    module = more(kind, batch)
    for selector in module.selectors().values():
        selector.embedding.weight.data[1] = 3 * selector.embedding.weight.data[0]
    assert term(module, batch).item() == pytest.approx(math.log(2), abs=1e-5)


def test_it_is_nothing_when_rows_stand_on_their_embedding_and_the_others_point_away():
    batch = batch_of(PROMPTS[:1], ANSWERS[:1])
    module = more(batch=batch, targets=r".*layers\.0\..*q_proj")
    ((slot, x),) = inputs_of(module, batch).items()
    h = x[0, batch["prompt_mask"][0]].mean(0).float()
    e = module.adapted[slot].router.embedding.weight.data
    e.copy_(torch.stack([h, -h]))
    assert term(module, batch).item() < 1e-6
    e.neg_()
    assert term(module, batch).item() == pytest.approx(2 / 0.05, rel=1e-5)


def test_temperature_and_weight_are_the_officials_and_scale():
    batch = random_batch()
    module = more(batch=batch)
    callback = watch(module, batch, TaskContrast())
    assert (callback.weight, callback.temperature) == (0.1, 0.05)
    module.begin(batch)
    module.row_losses(batch)
    tenth = callback.loss_terms(module, batch)["contrast"].item()
    assert tenth == pytest.approx(0.1 * term(module, batch).item(), rel=1e-6)
    assert term(module, batch, temperature=5.0).item() == pytest.approx(math.log(2), abs=0.2)


def test_rows_of_the_global_batch_share_the_mean():
    """A micro-batch divides by its share of the global batch's rows, as the task loss does."""
    batch = random_batch()
    module = more(batch=batch)
    whole = term(module, batch).item()
    assert term(module, batch | {"rows_share": 8.0}).item() == pytest.approx(whole / 2, rel=1e-6)


def test_a_shared_table_of_another_width_is_compared_too():
    batch = random_batch()
    module = more(batch=batch, embedding_dim=6)
    term(module, batch).backward()
    assert (module.task_embedding.weight.grad.abs().amax(1) > 0).all()


# ---- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_row_of_the_embeddings_is_moved_and_the_gate_is_not(kind):
    batch = random_batch(kind=kind)
    batch["task_id"].zero_()  # rows of one task: the other's embedding is pushed away all the same
    module = more(kind, batch=random_batch(kind=kind))
    term(module, batch, detach=True).backward()
    for slot, selector in module.selectors().items():
        assert (selector.embedding.weight.grad.abs().amax(1) > 0).all(), slot
        assert selector.weight.grad is None and selector.bias.grad is None


def test_the_gradient_draws_the_own_embedding_near_and_pushes_the_others_away():
    batch = random_batch()
    batch["task_id"].zero_()
    module = more(batch=random_batch())
    inputs = inputs_of(module, batch)
    # At a high temperature; at 0.05 a row that stands near its own embedding hardly moves anything.
    term(module, batch, detach=True, temperature=1.0).backward()
    for slot, selector in module.selectors().items():
        places = tokens_that_count("causal", slot, batch)
        h = torch.stack([inputs[slot][row, at].mean(0) for row, at in enumerate(places)])
        before = selector.embedding.weight.detach().double()
        after = before - 0.01 * selector.embedding.weight.grad.double() / selector.embedding.weight.grad.norm()
        change = [
            (torch.cosine_similarity(h, now) - torch.cosine_similarity(h, then)).mean()
            for now, then in zip(after, before, strict=True)
        ]
        assert change[0] > 0 > change[1], slot


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("detach", [False, True])
def test_detach_keeps_the_gradient_from_earlier_layers(kind, detach):
    batch = random_batch(kind=kind)
    module = more(kind, batch)
    term(module, batch, detach=detach).backward()
    reached = {slot for slot, layer in module.adapted.items() if layer.factors.B.grad is not None}
    assert all(selector.embedding.weight.grad.any() for selector in module.selectors().values())
    if detach:
        assert not reached
    else:
        first, last = next(iter(module.adapted)), list(module.adapted)[-1]
        assert module.adapted[first].factors.B.grad.any() and last not in reached


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"weight": 0.0}, {"weight": -1.0}, {"temperature": 0.0}], ids=str)
def test_a_weight_or_temperature_that_is_not_positive_is_refused(options):
    with pytest.raises(ValueError, match="must be positive; leave the callback out"):
        TaskContrast(**options)


@pytest.mark.parametrize("method", [LoRA, TRex])
def test_a_method_without_task_embeddings_is_refused(method):
    with pytest.raises(ValueError, match=f"^TaskContrast: {method.__name__} has no task embeddings; remove the"):
        TaskContrast().on_fit_start(None, build(method))
