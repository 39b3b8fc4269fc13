"""TT-LoRA: the plain formula in fp64 on every kind of backbone, PEFT as reader of its exports, and its own traps."""

import peft
import pytest
import torch
from torch import nn

from moe_peft.context import RoutingContext
from moe_peft.interop.peft import export_peft
from moe_peft.layers.adapted import AdaptedLinear
from moe_peft.layers.factors import TensorTrainFactors
from moe_peft.layers.tensor_train import reconstruct
from moe_peft.methods.tt_lora import TTLoRA, layout_for
from tests.methods.tiny_more import KINDS, agree, answer
from tests.tiny import bare_logits, build, come_alive, logits, output, random_batch, tiny_backbone

SHAPES = {"32x32": [[2, 4, 4], [4, 8]], "32x48": [[8, 4], [4, 12]], "48x32": [[3, 4, 4], [8, 4]]}


def tt_lora(kind="causal", scale=0.3, **options):
    """A TT-LoRA in fp64 (but for heads) whose every core is proved to act, and its batch."""
    module = build(TTLoRA, kind, **{"rank": 3, "alpha": 2.0, "shapes": SHAPES} | options).double()
    if module.heads is not None:
        module.heads.float()
    batch = random_batch(kind=kind)
    return come_alive(module, batch, scale=scale), batch


def plainly_adapted(module, kind):
    """The bare model with W + alpha * (dense update) in every adapted linear's place."""
    torch.manual_seed(0)
    model = tiny_backbone(kind).load().double()
    for slot, layer in module.adapted.items():
        linear = model.get_submodule(slot)
        linear.weight.data += module.alpha * reconstruct(list(layer.factors.cores), layer.factors.layout)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_the_output_is_that_of_the_dense_formula(kind):
    module, batch = tt_lora(kind)
    agree(output(module, batch), answer(plainly_adapted(module, kind), batch), 1e-11)


@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_model_gives_the_same_and_unmerges(kind):
    module, batch = tt_lora(kind)
    module.eval()
    expected = output(module, batch)
    module.merge()
    agree(output(module, batch), expected, 1e-11)
    module.unmerge()
    assert torch.equal(output(module, batch), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_peft_reads_the_export_as_a_lora_of_the_middle_rank(kind, tmp_path):
    module, batch = tt_lora(kind)
    export_peft(module, tmp_path / "out", "tone")
    torch.manual_seed(0)
    theirs = peft.PeftModel.from_pretrained(tiny_backbone(kind).load(), tmp_path / "out").double()
    agree(answer(theirs, batch), output(module, batch), 1e-5)
    assert theirs.peft_config["default"].to_dict()["r"] == 3


def test_a_fresh_one_is_the_bare_base_to_the_bit_and_only_its_last_cores_move_first():
    module, batch = build(TTLoRA), random_batch()
    with torch.no_grad():
        assert torch.equal(logits(module, batch), bare_logits(module, batch))
    module(batch).sum().backward()
    for layer in module.adapted.values():
        *others, last = layer.factors.cores
        assert last.grad.abs().max() > 0 and all(core.grad.abs().max() == 0 for core in others)


def test_the_official_start_is_not_the_base():
    module, batch = build(TTLoRA, init="official"), random_batch()
    assert (logits(module, batch) - bare_logits(module, batch)).abs().max() > 1e-3


@pytest.mark.parametrize("alpha", [0.0, 1.0, 4.0])
def test_alpha_multiplies_the_update_once(alpha):
    module, _ = tt_lora()
    layer = next(iter(module.adapted.values()))
    x = torch.randn(1, 3, layer.in_features, dtype=torch.float64)
    layer.scale = alpha
    agree(layer.delta(x), alpha * x @ reconstruct(list(layer.factors.cores), layer.factors.layout).mT, 1e-12)


@pytest.mark.parametrize("form", ["two-dimensional", "three-dimensional", "non-contiguous"])
def test_inputs_of_any_form(form):
    torch.manual_seed(0)
    module, _ = tt_lora()
    layer = module.adapted["model.layers.0.mlp.down_proj"]
    x = torch.randn(5, 2, 48, dtype=torch.float64)
    given = {"two-dimensional": x[:, 0], "three-dimensional": x, "non-contiguous": x.transpose(0, 1)}[form]
    dense = layer.base.weight + module.alpha * reconstruct(list(layer.factors.cores), layer.factors.layout)
    agree(layer(given), given @ dense.mT, 1e-11)


def test_gradient_checkpointing_gives_the_same_gradients():
    def gradients(checkpointing):
        module = build(TTLoRA, backbone=tiny_backbone(gradient_checkpointing=checkpointing), rank=3, alpha=1.0)
        batch = random_batch()
        come_alive(module, batch)
        module.train()
        module(batch).sum().backward()
        return {name: p.grad for name, p in module.named_parameters() if p.requires_grad}

    plain, recomputed = gradients(False), gradients(True)
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, rtol=1e-5, atol=1e-6, msg=name)


def test_autocast_keeps_cores_in_fp32_and_close_to_fp32():
    module = build(TTLoRA, rank=3, alpha=1.0)
    batch = random_batch()
    come_alive(module, batch, scale=0.2)
    expected = output(module, batch)
    with torch.autocast("cpu", torch.bfloat16):
        found = output(module, batch)
    bare = bare_logits(module, batch)
    assert (found.float() - expected).abs().max() < 0.1 * (expected - bare).abs().max()
    assert all(core.dtype == torch.float32 for layer in module.adapted.values() for core in layer.factors.cores)


def test_without_gradients_the_cores_are_folded_once_a_batch(monkeypatch):
    module, batch = tt_lora()
    module.eval()
    folded = []
    own = TensorTrainFactors.forward
    monkeypatch.setattr(TensorTrainFactors, "forward", lambda self, *a: folded.append(self) or own(self, *a))
    with torch.no_grad():
        first = output(module, batch)
        ids = {name: batch[name] for name in ("input_ids", "attention_mask")}
        for _ in range(2):
            module.model(**ids)
        assert len(folded) == len(module.adapted)
        next(iter(module.adapted.values())).factors.cores[0].mul_(2)
        assert (output(module, batch) - first).abs().max() > 1e-3  # the next batch sees changed cores
    output(module, batch)
    assert len(folded) == 3 * len(module.adapted)


def test_frozen_heads_stay_and_are_saved():
    module = build(TTLoRA, "classifier", train_heads=False)
    assert not any(p.requires_grad for p in module.heads.parameters())
    assert "heads.linear.weight" in module.adapter_state()
    batch = random_batch(kind="classifier")
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=0.1)
    before = module.heads.linear.weight.clone()
    module(batch).sum().backward()
    optimizer.step()
    assert torch.equal(module.heads.linear.weight, before)


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        ({"32": [[32], [32]]}, 'is no size of a linear; write "<in>x<out>"'),
        ({"32x48": [[4, 8], [4, 11]]}, "the output modes [4, 11] multiply to 44, but the linear has 48"),
    ],
)
def test_shapes_that_fit_no_linear_are_refused_before_anything_is_loaded(shapes, words):
    with pytest.raises(ValueError, match="^shapes: ") as raised:
        TTLoRA(backbone=tiny_backbone(), tasks=[object()], shapes=shapes)
    assert words in str(raised.value)


def test_a_layer_of_a_prime_size_works():
    torch.manual_seed(0)
    base = nn.Linear(13, 7)
    factors = TensorTrainFactors(layout_for(base, {}), 3, "official")
    layer = AdaptedLinear(base, factors, None, 2.0, 0.0, RoutingContext(), "odd")
    x = torch.randn(2, 3, 13)
    torch.testing.assert_close(layer.delta(x), 2 * x @ reconstruct(list(factors.cores), factors.layout).mT)
