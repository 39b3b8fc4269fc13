"""When the contrastive task-embedding loss runs: in training steps only, once, also under recomputation."""

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

from moe_peft.callbacks.task_contrast import TaskContrast
from moe_peft.methods.more import MoRE
from tests.callbacks.tiny_contrast import KINDS, expected_losses, mean_of, more, watch
from tests.tiny import build, come_alive, random_batch, tiny_backbone


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
        parts = module.context.terms("contrast").values()
        loss.backward()
        found.append((loss.detach(), {name: p.grad for name, p in module.named_parameters() if p.requires_grad}))
        assert terms["contrast"] > 0.001 and terms["rank_cost"] > 0.05
        assert (len(seen) > forwards) == on
        assert all(now is part for now, part in zip(module.context.terms("contrast").values(), parts, strict=True))
    (loss, gradients), (again, recomputed) = found
    torch.testing.assert_close(again, loss)
    for name, gradient in gradients.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(recomputed[name], gradient, rtol=1e-4, atol=1e-6)
