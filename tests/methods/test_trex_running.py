"""What a faithful T-REX shows (arXiv 2404.08985 and its official code): properties 16 to 20, of its use.

Checkpoints, a missing prior, generation, recomputation, several processes, low precision, and where the prior is from.
"""

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

from moe_peft.callbacks.semantic_prior import SemanticPriorFit, kmeans
from moe_peft.checkpoint import read_checkpoint
from moe_peft.methods.trex import TRex
from tests.methods.ddp_worker import assert_trained_as_one, run_processes
from tests.tiny import (
    T5,
    TASKS,
    bare_logits,
    batch_of,
    build,
    come_alive,
    fit_prior,
    logits,
    output,
    random_batch,
    randomise,
    tiny_backbone,
)

R1, R2 = 2, 3
KINDS = ["causal", "seq2seq", "classifier"]


def trex(kind="causal", batch=None, **options):
    module = build(TRex, kind, **{"r1": R1, "r2": R2} | options)
    return come_alive(module, random_batch(kind=kind) if batch is None else batch)


def trainer(folder, **options):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return pl.Trainer(default_root_dir=folder, accelerator="cpu", **quiet, **options)


# ---- 16: checkpoints -------------------------------------------------------------------------------------------------


def saved(module, folder):
    """Fits one step at rate zero and saves with the trainer."""
    module.optimizer, module.scheduler = (lambda groups: torch.optim.SGD(groups, lr=0.0)), None
    module.lr.gates = 0.0
    run = trainer(folder, max_steps=1, enable_checkpointing=False)
    run.fit(module, DataLoader([random_batch(kind=module.backbone.kind)], batch_size=None))
    run.save_checkpoint(folder / "last.ckpt")
    return folder / "last.ckpt"


def restored(path, kind="causal", **options):
    module = build(TRex, kind, **{"r1": R1, "r2": R2} | options)
    checkpoint = read_checkpoint(path)
    module.on_load_checkpoint(checkpoint)
    module.load_state_dict(checkpoint["state_dict"])
    return module


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"clusters": 5}, {"factorised_router": True}], ids=str)
def test_16_a_restored_checkpoint_gives_the_same_output(tmp_path, kind, options):
    batch = random_batch(kind=kind)
    module = trex(kind, **options)
    expected = output(module, batch)
    fresh = restored(saved(module, tmp_path), kind, **options)
    assert torch.equal(output(fresh, batch), expected)
    if kind == "classifier":
        assert torch.equal(fresh(batch), module(batch))


def test_16_the_checkpoint_holds_no_frozen_weight(tmp_path):
    module = trex()
    state = read_checkpoint(saved(module, tmp_path))["state_dict"]
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    assert state.keys() == trained | {f"prior.{name}" for name in module.prior.state_dict()}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r1": 3}, r"factors.A has shape \[2, 48\], this run's \[3, 48\]: another rank"),
        ({"r2": 4}, r"factors.B has shape \[32, 3\], this run's \[32, 4\]: another rank"),
        ({"clusters": 5}, "lacks 14 tensors.*projection"),
        ({"targets": ["q_proj"]}, "has unexpected"),
    ],
)
def test_16_another_allocation_is_refused_in_one_line(tmp_path, options, message):
    path = saved(trex(), tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        restored(path, **options)
    assert "\n" not in str(error.value)


def test_16_another_base_is_refused(tmp_path):
    path = saved(trex(), tmp_path)
    with pytest.raises(ValueError, match="checkpoint of another fingerprint.*configure its backbone"):
        restored(path, seed=5)


# ---- 17: a missing prior, generation ---------------------------------------------------------------------------------


def test_17_an_unfitted_prior_is_an_error():
    module = build(TRex)
    with pytest.raises(ValueError, match="semantic prior is not fitted.*SemanticPriorFit"):
        module(random_batch())


def test_17_token_only_leaves_exactly_the_tokens_part():
    module, batch = build(TRex, r1=R1, r2=R2, missing_prior="token_only"), random_batch()
    ablation = come_alive(build(TRex, r1=R1, r2=R2, use_prior=False), batch)
    module.load_state_dict(ablation.adapter_state() | {f"prior.{n}": v for n, v in module.prior.state_dict().items()})
    assert torch.equal(logits(module, batch), logits(ablation, batch))
    fit_prior(module)
    assert (logits(module, batch) - logits(ablation, batch)).abs().max() > 1e-3


def test_17_a_prior_is_never_stale():
    """A model that is called past the module, or with the adapters' facts of another moment, raises."""
    first, second = random_batch(seed=3), random_batch(seed=4)
    module = trex(batch=first)
    logits(module, first)
    with pytest.raises(ValueError, match="other rows than its routing facts"):
        module.model(input_ids=second["input_ids"], attention_mask=second["attention_mask"])
    with module.context.disabled():
        module.begin(second)
    with pytest.raises(ValueError, match="without a semantic prior"):
        module.model(input_ids=second["input_ids"], attention_mask=second["attention_mask"])


def test_17_decoding_with_a_cache_gives_the_logits_of_the_full_forward():
    batch = batch_of([[5, 6, 7, 8], [9, 10, 11, 12, 13, 14]], [[], []])
    module = trex(batch=batch_of([[5, 6, 7, 8], [9, 10, 11, 12, 13, 14]], [[3], [4]]))
    module.begin(batch)
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    done = module.model.generate(
        **inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    answers = done.sequences[:, batch["input_ids"].shape[1] :]
    whole = batch_of([[5, 6, 7, 8], [9, 10, 11, 12, 13, 14]], answers.tolist())
    full = logits(module, whole)[:, -7:-1]
    assert (full - bare_logits(module, whole)[:, -7:-1]).abs().max() > 1e-3
    torch.testing.assert_close(torch.stack(done.logits, 1), full, rtol=0, atol=1e-4)


# ---- 18: recomputation, precision, processes -------------------------------------------------------------------------


def checkpointing_backbone(kind, on):
    """T5 keeps its dropout here: a backbone that recomputes must not begin to drop."""
    backbone = tiny_backbone(kind, gradient_checkpointing=on)
    if kind == "seq2seq":
        backbone.shape = T5 | {"dropout_rate": 0.5}
    return backbone


def two_batches(kind, on):
    """Two forwards of two batches before one backward; returns losses, gradients and calls of the first linear."""
    module = build(TRex, kind, r1=R1, r2=R2, backbone=checkpointing_backbone(kind, on))
    batches = [random_batch(kind=kind, seed=seed) for seed in (3, 4)]
    come_alive(module, batches[0])
    module.train()
    calls = []
    next(iter(module.adapted.values())).register_forward_pre_hook(lambda layer, args: calls.append(layer))
    losses = [module(batch).sum() for batch in batches]
    (losses[0] + 2 * losses[1]).backward()
    gradients = {name: p.grad for name, p in module.named_parameters() if p.requires_grad}
    return torch.stack(losses).detach(), gradients, len(calls)


@pytest.mark.parametrize("kind", KINDS)
def test_18_gradient_checkpointing_changes_no_loss_and_no_gradient(kind):
    losses, gradients, calls = two_batches(kind, False)
    losses_again, gradients_again, calls_again = two_batches(kind, True)
    assert (calls, calls_again) == (2, 4), "nothing was recomputed"
    assert losses[0] != losses[1]
    torch.testing.assert_close(losses_again, losses)
    for name, gradient in gradients.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(gradients_again[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_18_a_trainer_recomputes_where_the_backbone_asks_for_it(tmp_path, kind):
    module = build(TRex, kind, r1=R1, r2=R2, backbone=tiny_backbone(kind, gradient_checkpointing=True))
    fit_prior(module)
    calls = []
    next(iter(module.adapted.values())).register_forward_pre_hook(lambda layer, args: calls.append(layer))
    run = trainer(tmp_path, max_steps=2, enable_checkpointing=False)
    run.fit(module, DataLoader([random_batch(kind=kind)] * 2, batch_size=None))
    assert len(calls) == 4


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("kind", KINDS)
def test_18_a_low_precision_base_gives_nearly_the_loss_and_gradients_of_fp32(kind, dtype):
    batch, results = random_batch(kind=kind), []
    for name in ("float32", dtype):
        backbone = tiny_backbone(kind)
        backbone.dtype = getattr(torch, name)
        module = build(TRex, kind, r1=R1, r2=R2, backbone=backbone)
        fit_prior(module)
        randomise(module, scale=0.1)
        assert all(p.dtype == torch.float32 for p in module.parameters() if p.requires_grad)
        with module.context.disabled(), torch.no_grad():
            bare = module(batch)
        losses = module(batch)
        losses.sum().backward()
        grads = torch.cat([p.grad.flatten() for p in module.parameters() if p.requires_grad])
        results.append((losses.detach(), (losses - bare).detach(), grads))
    (full, effect, gradient), (low, low_effect, low_gradient) = results
    assert low.dtype == torch.float32 and effect.abs().max() > 0.02
    torch.testing.assert_close(low, full, rtol=0.02, atol=0.02)
    assert (low_effect - effect).norm() < 0.2 * effect.norm()
    assert torch.cosine_similarity(low_gradient, gradient, dim=0) > 0.98


@pytest.mark.slow
@pytest.mark.parametrize("loss_mean", ["row", "token"])
def test_18_two_processes_train_as_one(tmp_path, loss_mean):
    one, two = (run_processes(processes, tmp_path, "TRex", loss_mean) for processes in (1, 2))
    # A gate's gradient is a sum over all tokens times a slope of 100: fp32 leaves it four digits.
    assert_trained_as_one(one, two, first=2e-4, later=2e-3)


# ---- 19-20: the prior ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["none", "cosine", "softmax"])
def test_19_a_precomputed_prior_is_the_online_one(norm):
    """Computed once from each prompt alone, or inside the forward of a padded batch with answers."""
    prompts, answers = [[5, 6, 7], [9, 10, 11, 12, 13], [20, 21, 22, 23]], [[30, 31], [32], [33, 34, 35]]
    module = trex(prior_norm=norm)
    precomputed = torch.cat([module.prior(batch_of([prompt], [[]])) for prompt in prompts])
    assert (precomputed[0] - precomputed[1]).abs().max() > 1e-2
    for batch in (batch_of(prompts, answers), batch_of(prompts, answers, side="right", extra=3)):
        module(batch)
        torch.testing.assert_close(module.context.get("prior", 3), precomputed, rtol=0, atol=1e-6)


def test_19_a_cosine_prior_has_unit_centroids():
    module = trex(prior_norm="cosine")
    prior = module.prior
    embeddings = torch.nn.functional.normalize(prior.centroids, dim=1)
    prior.embedder.forward = lambda batch: embeddings
    torch.testing.assert_close(prior(random_batch()).diagonal(), torch.ones(R1 * R2))


class Prompts(pl.LightningDataModule):
    """Training prompts, stratified over two tasks, and one training batch."""

    specs = TASKS

    def sample_prompts(self, count, seed):
        return [random_batch(8, seed=seed + part) for part in range(4)]

    def train_dataloader(self):
        return DataLoader([random_batch()], batch_size=None)


def test_20_a_fit_clusters_the_training_prompts_with_a_fixed_seed(tmp_path):
    fitted = []
    for _ in range(2):
        module = build(TRex, r1=R1, r2=R2)
        run = trainer(tmp_path, max_steps=1, enable_checkpointing=False, callbacks=[SemanticPriorFit(seed=3)])
        run.fit(module, Prompts())
        fitted.append(module.prior)
    prior, again = fitted
    assert torch.equal(prior.centroids, again.centroids)
    embeddings = torch.cat([prior.embedder(batch) for batch in Prompts().sample_prompts(2000, 3)])
    torch.testing.assert_close(prior.centroids, kmeans(embeddings, R1 * R2, seed=3), rtol=0, atol=1e-6)
    labels = prior.assign(embeddings)
    for cluster in range(R1 * R2):
        torch.testing.assert_close(prior.centroids[cluster], embeddings[labels == cluster].mean(0))
