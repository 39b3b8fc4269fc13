"""The contrastive task-embedding loss: its value from hooked inputs, its gradients, its masks, and when it runs at all.

Shapes: B rows, S prompt and answer tokens, L decoder tokens, T = 2 tasks.
"""

import math

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

from moe_peft.batch import IGNORE_INDEX
from moe_peft.callbacks.task_contrast import TaskContrast
from moe_peft.methods.lora import LoRA
from moe_peft.methods.more import MoRE
from moe_peft.methods.trex import TRex
from tests.tiny import batch_of, build, come_alive, random_batch, tiny_backbone

KINDS = ["causal", "seq2seq", "classifier"]
REPRESENTATIONS = ["first_token", "mean", "last_token"]
PROMPTS, ANSWERS = [[5, 6, 7, 8], [9, 10, 11, 12, 13], [20, 21, 22], [31, 32]], [[40, 41], [42], [43, 44, 45], [46]]
EQUAL = [[50, 51, 52, 53, 54], [55, 56], [57, 58, 59], [60]]
"""Answers whose longest has as many tokens as the longest prompt: a wrong mask would still fit its tensor."""


def more(kind="causal", batch=None, **options):
    module = build(MoRE, kind, **{"rank": 4} | options)
    return come_alive(module, random_batch(kind=kind) if batch is None else batch).train()


def watch(module, batch, callback):
    """Attaches a callback as a fit does."""
    callback.on_fit_start(None, module)
    callback.on_train_batch_start(None, module, batch, 0)
    return callback


def term(module, batch, **options):
    """The contrastive term of a batch, weight 1, with its graph."""
    callback = watch(module, batch, TaskContrast(weight=1.0, **options))
    module.begin(batch)
    module.row_losses(batch)
    return callback.loss_terms(module, batch)["contrast"]


def inputs_of(module, batch):
    """What every adapted linear reads, by slot: [B, S or L, D] in fp64."""
    seen = {}
    hooks = [
        layer.register_forward_pre_hook(lambda layer, args: seen.update({layer.slot: args[0].detach().double()}))
        for layer in module.adapted.values()
    ]
    module.begin(batch)
    module.row_losses(batch)
    for hook in hooks:
        hook.remove()
    return seen


def tokens_that_count(kind, slot, batch):
    """Places of the tokens that count, a list per row, from the row's own lengths."""
    own = [row.nonzero().flatten().tolist() for row in batch["prompt_mask"]]
    if kind != "seq2seq" or not slot.startswith("decoder."):
        return own
    if "EncDecAttention" in slot and slot.endswith((".k", ".v")):
        return own
    return [list(range(int((row != IGNORE_INDEX).sum()))) for row in batch["labels"]]


def expected_losses(module, batch, kind, how):
    """-log softmax(cos / 0.05)[task] of every linear and row, by slot, by loops in fp64."""
    losses = {}
    for slot, x in inputs_of(module, batch).items():
        e = module.adapted[slot].router.task_embeddings().detach().double()
        losses[slot] = []
        for row, places in enumerate(tokens_that_count(kind, slot, batch)):
            h = {"first_token": x[row, places[0]], "mean": x[row, places].mean(0), "last_token": x[row, places[-1]]}[
                how
            ]
            scores = [float(h @ e[t] / h.norm() / e[t].norm()) / 0.05 for t in range(len(e))]
            highest = max(scores)
            total = highest + math.log(sum(math.exp(score - highest) for score in scores))
            losses[slot].append(total - scores[int(batch["task_id"][row])])
    return losses


def mean_of(losses):
    rows = [loss for row in losses.values() for loss in row]
    return sum(rows) / len(rows)


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


# ---- when it runs ----------------------------------------------------------------------------------------------------


class Stages(pl.Callback):
    """Notes the stage of every comparison, and what was logged."""

    def __init__(self):
        self.stages, self.logged, self.tasks = [], {}, []

    def on_fit_start(self, trainer, pl_module):
        own = pl_module.context.contrast

        def compare(slot, x, embeddings):
            self.stages.append(trainer.state.stage.value)
            return own(slot, x, embeddings)

        pl_module.context.contrast = compare

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.logged = {name: value.item() for name, value in trainer.callback_metrics.items()}
        self.logged["returned"] = outputs["loss"].item()


def fit(module, batch, folder, *callbacks, steps=1, **options):
    module.optimizer, module.scheduler = (lambda groups: torch.optim.SGD(groups, lr=0.0)), None
    for group in ("adapters", "routers", "gates", "heads"):
        setattr(module.lr, group, 0.0)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        max_steps=steps,
        callbacks=list(callbacks),
        enable_checkpointing=False,
        **quiet,
    )
    trainer.fit(module, DataLoader([batch] * steps, batch_size=None), **options)
    return trainer


@pytest.mark.parametrize("kind", KINDS)
def test_a_fits_loss_is_the_task_loss_and_a_tenth_of_the_contrast(tmp_path, kind):
    batch = random_batch(kind=kind)
    module, stages = more(kind, batch), Stages()
    expected = mean_of(expected_losses(module, batch, kind, "mean"))
    with torch.no_grad():
        task_loss = module(batch).mean().item()
    fit(module, batch, tmp_path, TaskContrast(), stages)
    assert stages.logged["train/contrast"] == pytest.approx(0.1 * expected, rel=1e-4)
    assert stages.logged["train/task_loss"] == pytest.approx(task_loss, rel=1e-5)
    total = task_loss + 0.1 * expected
    assert stages.logged["train/loss"] == pytest.approx(total, rel=1e-5)
    assert stages.logged["returned"] == pytest.approx(total, rel=1e-5)


class Validating(MoRE):
    """Scores validation batches by a plain forward."""

    def validation_step(self, batch, batch_idx):
        return self(batch).sum()

    def on_validation_epoch_start(self):
        pass

    def on_validation_epoch_end(self):
        pass

    def predict_step(self, batch, batch_idx):
        return self(batch)

    def on_predict_epoch_end(self):
        pass


def test_validation_within_a_fit_compares_nothing_and_later_forwards_neither(tmp_path):
    batch = random_batch()
    module, stages, contrast = come_alive(build(Validating, rank=4), batch), Stages(), TaskContrast()
    forwards = []
    first = next(iter(module.adapted.values()))
    first.register_forward_pre_hook(lambda layer, args: forwards.append(layer.training))
    val = {"val_dataloaders": DataLoader([batch] * 3, batch_size=None)}
    fit(module, batch, tmp_path, contrast, stages, steps=2, **val)
    assert forwards.count(True) == 2 and forwards.count(False) >= 3
    assert stages.stages == ["train"] * 2 * len(module.adapted)
    assert module.context.contrast is None
    module.train()
    module(batch)
    assert len(stages.stages) == 2 * len(module.adapted)


def test_a_fit_that_breaks_off_lets_the_layers_go(tmp_path):
    class Break(pl.Callback):
        def on_train_batch_end(self, *_):
            raise RuntimeError("broken off")

    module = more()
    with pytest.raises(RuntimeError, match="broken off"):
        fit(module, random_batch(), tmp_path, TaskContrast(), Break())
    assert module.context.contrast is None
    module.train()(random_batch(6, seed=8))


@pytest.mark.parametrize("kind", ["causal", "seq2seq"])
def test_neither_evaluation_nor_generation_compares_anything(kind):
    batch = random_batch(kind=kind)
    module = more(kind, batch).eval()

    def never(slot, x, embeddings):
        raise AssertionError("compared outside training")

    module.context.contrast = never
    with torch.no_grad():
        module(batch)
        module.begin(batch)
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        module.model.generate(**inputs, max_new_tokens=2, num_beams=2, pad_token_id=0)
    assert not module.context.terms("contrast")
    with pytest.raises(AssertionError, match="compared"):
        module.train()(batch)


@pytest.mark.parametrize("kind", KINDS)
def test_recomputation_changes_no_gradient_and_keeps_nothing(kind):
    """With contrast and rank cost on; a term that recomputation left behind would keep every activation alive."""
    batch, found = random_batch(kind=kind), []
    for on in (False, True):
        backbone = tiny_backbone(kind, gradient_checkpointing=on)
        module = come_alive(build(MoRE, kind, rank=4, backbone=backbone, rank_cost=0.05), batch).train()
        seen = []
        for layer in module.adapted.values():
            layer.register_forward_pre_hook(lambda layer, args, seen=seen: seen.append(layer))
        callback = watch(module, batch, TaskContrast())
        module.begin(batch)
        loss = module.row_losses(batch)[0].sum()
        terms = callback.loss_terms(module, batch) | module.method_loss_terms(batch)
        forwards, loss = len(seen), loss + sum(terms.values())
        parts = module.context.terms("contrast")
        loss.backward()
        found.append((loss.detach(), {name: p.grad for name, p in module.named_parameters() if p.requires_grad}))
        assert terms["contrast"] > 0.001 and terms["rank_cost"] > 0.05
        assert (len(seen) > forwards) == on
        assert all(now is part for now, part in zip(module.context.terms("contrast"), parts, strict=True))
    (loss, gradients), (again, recomputed) = found
    torch.testing.assert_close(again, loss)
    for name, gradient in gradients.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(recomputed[name], gradient, rtol=1e-4, atol=1e-6)


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"weight": 0.0}, {"weight": -1.0}, {"temperature": 0.0}], ids=str)
def test_a_weight_or_temperature_that_is_not_positive_is_refused(options):
    with pytest.raises(ValueError, match="must be positive; leave the callback out"):
        TaskContrast(**options)


@pytest.mark.parametrize("method", [LoRA, TRex])
def test_a_method_without_task_embeddings_is_refused(method):
    with pytest.raises(ValueError, match=f"^TaskContrast: {method.__name__} has no task embeddings; remove the"):
        TaskContrast().on_fit_start(None, build(method))
