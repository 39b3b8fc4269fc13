"""LoRA is numerically HF PEFT's LoRA: same A and B, same outputs, gradients and training."""

import peft
import pytest
import torch

from moe_peft.backbones import CausalLM
from moe_peft.methods.lora import LoRA
from moe_peft.methods.scoring import answer_nll, pooled_features
from tests.tiny import build, come_alive, output, random_batch, randomise, tiny_backbone

KINDS = ["causal", "seq2seq", "classifier"]
RANK, ALPHA = 4, 10.0


def pair(kind):
    """Returns our module and PEFT's model with the same base and the same random factors."""
    batch = random_batch(kind=kind)
    ours = come_alive(build(LoRA, kind, rank=RANK, alpha=ALPHA), batch, scale=0.1)
    torch.manual_seed(0)
    base = tiny_backbone(kind).load()
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(ours.adapted), lora_dropout=0.0)
    theirs = peft.get_peft_model(base, config).eval().get_base_model()
    for slot, layer in ours.adapted.items():
        other = theirs.get_submodule(slot)
        assert torch.equal(other.base_layer.weight, layer.base.weight)
        other.lora_A.default.weight.data.copy_(layer.factors.A)
        other.lora_B.default.weight.data.copy_(layer.factors.B)
    return ours, theirs, batch


def factors(ours, theirs):
    """Yields every factor of ours with PEFT's."""
    for slot, layer in ours.adapted.items():
        other = theirs.get_submodule(slot)
        yield layer.factors.A, other.lora_A.default.weight
        yield layer.factors.B, other.lora_B.default.weight


def loss(ours, model, batch):
    """One scalar of a model, ours or PEFT's."""
    if ours.backbone.kind == "classifier":
        return (pooled_features(ours.backbone, model, batch) * torch.linspace(-1, 1, 32)).sum(1).square().mean()
    return answer_nll(ours.backbone, model, batch).sum() / batch["tokens_share"]


def close(one, other, tolerance):
    """Compares two tensors relative to the largest number in them."""
    torch.testing.assert_close(one, other, rtol=0, atol=tolerance * max(1.0, other.abs().max().item()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_outputs_and_gradients_equal_peft(kind, dtype, tolerance):
    ours, theirs, batch = pair(kind)
    ours, theirs = ours.to(dtype), theirs.to(dtype)
    found = theirs(**{name: batch[name] for name in ("input_ids", "attention_mask", "labels") if name in batch})
    expected = found.last_hidden_state if kind == "classifier" else found.logits
    given = output(ours, batch)
    assert given.dtype == dtype
    close(given, expected, tolerance)
    upstream = torch.linspace(-1, 1, given.numel(), dtype=dtype).view_as(given)
    given.backward(upstream)
    expected.backward(upstream)
    for one, other in factors(ours, theirs):
        assert other.grad.abs().max() > 1e-3
        close(one.grad, other.grad, tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_five_steps_of_adamw_equal_peft(kind):
    ours, theirs, batch = pair(kind)
    losses = []
    for model in (ours.model, theirs):
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-3)
        run = []
        for _ in range(6):
            value = loss(ours, model, batch)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            run.append(value.item())
        losses.append(run)
    assert losses[0][5] < losses[0][0] - 0.01
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_lora_is_the_bare_base_to_the_bit(kind):
    ours, batch = build(LoRA, kind), random_batch(kind=kind)
    with ours.context.disabled():
        bare = output(ours, batch)
    assert torch.equal(output(ours, batch), bare)


def test_dropout_acts_on_the_adapters_input_in_training_only():
    batch = random_batch()
    module = come_alive(build(LoRA, dropout=0.5), batch)
    plain = come_alive(build(LoRA), batch)
    module.eval()
    assert torch.equal(output(module, batch), output(plain, batch))
    module.train()
    assert not torch.equal(output(module, batch), output(module, batch))
    with module.context.disabled():
        assert torch.equal(output(module, batch), output(module, batch))


def test_a_rank_below_one_is_refused():
    with pytest.raises(ValueError, match="rank: 0 must be at least 1"):
        build(LoRA, rank=0)


OPT = {
    "model_type": "opt",
    "vocab_size": 97,
    "hidden_size": 32,
    "word_embed_proj_dim": 32,
    "ffn_dim": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "dropout": 0.5,
    "pad_token_id": 0,
}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_frozen_base_never_drops_in_training(checkpointing):
    """OPT's layers call functional dropout on their own training flag."""
    backbone = CausalLM("opt", dtype="float32", shape=OPT, random_weights=True, gradient_checkpointing=checkpointing)
    module = build(LoRA, backbone=backbone)
    randomise(module)
    batch = random_batch()
    assert torch.equal(module.train()(batch), module.eval()(batch))
