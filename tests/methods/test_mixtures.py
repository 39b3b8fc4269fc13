"""Mixtures of experts in single linears: each is its formula, a slow loop over tokens and experts in fp64."""

import pytest
import torch

from moe_peft.methods.hydra_lora import HydraLoRA
from moe_peft.methods.lora import LoRA
from moe_peft.methods.lora_moe import LoRAMoE
from moe_peft.methods.mixlora import MixLoRA
from moe_peft.methods.mixlora_linear import MixLoRALinear
from moe_peft.methods.mode import MoDE
from moe_peft.methods.mola import MoLA
from moe_peft.methods.smora import SMoRA
from tests.methods.tiny_mixtures import SLOT, looped, mixture, tokens, update_of
from tests.tiny import TASKS, build, come_alive, output, random_batch, randomise, tiny_backbone

UP = SLOT["causal"]
E, R = 4, 4


def blocks(layer):
    """Every expert's (A [r, D], B [O, r])."""
    a, b = layer.factors()
    return list(zip(a.split(R), b.split(R, 1), strict=True))


def heads(layer):
    """The shared A [r, D] and every head B [O, r]."""
    a, b = layer.factors()
    return a, b.split(R, 1)


def dense_blocks(layer, token):
    g = (layer.router.weight @ token).softmax(0)
    return sum(g[e] * b @ (a @ token) for e, (a, b) in enumerate(blocks(layer)))


def two_largest(layer, token):
    scores = (layer.router.weight @ token).tolist()
    kept = sorted(range(E), key=lambda e: -scores[e])[:2]
    size = torch.tensor([scores[e] for e in kept], dtype=torch.float64).exp()
    experts = blocks(layer)
    return sum(w / size.sum() * experts[e][1] @ (experts[e][0] @ token) for w, e in zip(size, kept, strict=True))


def hydra(layer, token):
    a, own = heads(layer)
    read = token if layer.router.reads == "x" else a @ token
    g = (layer.router.weight @ read).softmax(0)
    return sum(g[e] * b @ (a @ token) for e, b in enumerate(own))


def dyadic(ranks):
    def update(layer, token):
        (a, own), total = heads(layer), 0
        for j in range(R):
            first = j // ranks * E
            g = (layer.router.weight[first : first + E] @ token).softmax(0)
            total = total + sum(g[e] * b[:, j] * (a[j] @ token) for e, b in enumerate(own))
        return total

    return update


def biased(layer, token):
    layer.router.bias.copy_(torch.tensor([0.3, -0.2, 0.1, 0.0]))
    u = ((layer.router.weight @ token).sigmoid() + layer.router.bias).tolist()
    kept = sorted(range(E), key=lambda e: -u[e])[:2]
    experts, total = blocks(layer), sum(u[e] for e in kept)
    return sum(2 * u[e] / total * experts[e][1] @ (experts[e][0] @ token) for e in kept)


FORMULAS = [
    (LoRAMoE, {}, dense_blocks, 8 / R),
    (MoLA, {"top_k": 2}, two_largest, 8 / R),
    (HydraLoRA, {}, hydra, 8 / R),
    (HydraLoRA, {"router_input": "Ax"}, hydra, 8 / R),
    (MoDE, {}, dyadic(1), 8 / R),
    (MoDE, {"ranks_per_router": 2}, dyadic(2), 8 / R),
    (MoDE, {"ranks_per_router": R}, dyadic(R), 8 / R),
    (SMoRA, {"top_k": 2}, biased, 8 / (2 * R)),
]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("own, arguments, formula, scale", FORMULAS)
def test_every_token_gets_what_the_formula_says(own, arguments, formula, scale, training):
    module = mixture(own, experts=E, rank=R, alpha=8.0, **arguments)
    layer = module.adapted[UP].train(training)
    with torch.no_grad():
        x = tokens(module, UP)
        expected = scale * looped(x, lambda token: formula(layer, token))
        assert expected.abs().max() > 0.1
        torch.testing.assert_close(update_of(layer, x), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("how", ["base", "autocast"])
@pytest.mark.parametrize("own, arguments", [case[:2] for case in FORMULAS] + [(MixLoRA, {}), (MixLoRALinear, {})])
def test_half_precision_gives_nearly_the_losses_and_gradients_of_fp32(own, arguments, how):
    """Experts whose scores are close may change places: at most a few gradients do."""
    batch, found = random_batch(), []
    for half in (False, True):
        backbone = tiny_backbone()
        backbone.dtype = torch.bfloat16 if half and how == "base" else torch.float32
        module = build(own, backbone=backbone, experts=E, rank=R, alpha=8.0, **arguments)
        randomise(module, scale=0.1)
        with module.context.disabled(), torch.no_grad():
            bare = module(batch)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half and how == "autocast"):
            losses = module(batch)
        losses.sum().backward()
        gradients = [p.grad for p in module.parameters() if p.requires_grad]
        assert {gradient.dtype for gradient in gradients} == {torch.float32}
        found.append((losses.detach(), torch.cat([gradient.flatten() for gradient in gradients]), losses - bare))
    (losses, gradient, moved), (nearly, other, _) = found
    assert moved.abs().max() > 0.02
    assert (nearly - losses).abs().max() < 0.02
    assert torch.nn.functional.cosine_similarity(other, gradient, 0) > 0.95


def test_mode_with_one_routing_for_all_ranks_is_hydra_lora():
    hydra_like = mixture(MoDE, experts=E, rank=R, ranks_per_router=R)
    other = mixture(HydraLoRA, experts=E, rank=R)
    other.load_state_dict(hydra_like.adapter_state())
    batch = random_batch()
    with torch.no_grad():
        torch.testing.assert_close(output(other, batch), output(hydra_like, batch), rtol=0, atol=1e-12)


@pytest.mark.parametrize("own", [HydraLoRA, MoDE])
def test_even_weights_are_a_lora_with_the_mean_head(own):
    module = mixture(own, experts=E, rank=R, alpha=8.0)
    layer, x = module.adapted[UP], tokens(module, UP)
    layer.router.weight.data.zero_()
    a, own_heads = heads(layer)
    with torch.no_grad():
        expected = 2.0 * x @ a.T @ (sum(own_heads) / E).T
        torch.testing.assert_close(update_of(layer, x), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("own", [LoRAMoE, MoLA, SMoRA])
def test_equal_experts_are_one_lora_whatever_the_routing(own):
    module = mixture(own, experts=E, rank=R, alpha=8.0, **{} if own is LoRAMoE else {"top_k": 2})
    layer, x = module.adapted[UP], tokens(module, UP)
    a, b = blocks(layer)[0]
    layer.factors.A.data.copy_(a.repeat(E, 1))
    layer.factors.B.data.copy_(b.repeat(1, E))
    with torch.no_grad():
        torch.testing.assert_close(update_of(layer, x), 2.0 * x @ a.T @ b.T, rtol=0, atol=1e-12)


def test_all_ranks_at_even_scores_are_a_lora_of_all_of_them():
    module = mixture(SMoRA, experts=E, rank=1, top_k=E, alpha=8.0)
    layer, x = module.adapted[UP], tokens(module, UP)
    layer.router.weight.data.zero_()
    a, b = layer.factors()
    with torch.no_grad():
        torch.testing.assert_close(update_of(layer, x), 8.0 / E * x @ a.T @ b.T, rtol=0, atol=1e-12)


@pytest.mark.parametrize("own, options", [(LoRAMoE, {}), (MoLA, {"top_k": 2}), (SMoRA, {"top_k": 2})])
def test_the_order_of_experts_is_no_matter(own, options):
    module = mixture(own, experts=E, rank=R, **options)
    layer, x, order = module.adapted[UP], tokens(module, UP), [2, 0, 3, 1]
    before = update_of(layer, x)
    a, b = layer.factors()
    layer.factors.A.data = a.data.unflatten(0, (E, R))[order].flatten(0, 1)
    layer.factors.B.data = b.data.unflatten(1, (E, R))[:, order].flatten(1, 2)
    assert (update_of(layer, x) - before).abs().max() > 1e-3
    layer.router.weight.data = layer.router.weight.data[order]
    torch.testing.assert_close(update_of(layer, x), before, rtol=0, atol=1e-12)


@pytest.mark.parametrize("own", [LoRA, MoLA, HydraLoRA, MoDE])
def test_layers_have_their_own_ranks_and_scales(own):
    module = mixture(own, layers=4, rank=[1, 2, 3, 4], alpha=[2.0, 4.0, 6.0, 4.0])
    for layer in range(4):
        adapted = module.adapted[f"model.layers.{layer}.self_attn.q_proj"]
        experts = 1 if own is LoRA else 8
        assert adapted.factors.rank_out == experts * (layer + 1)
        assert adapted.scale == [2.0, 2.0, 2.0, 1.0][layer]


def test_layers_have_their_own_experts_each_named_in_the_report():
    module = build(MoLA, experts=[2, 3], rank=2)
    batch = random_batch()
    come_alive(module, batch).eval()
    module.context.recording = True
    module(batch)
    found = {slot: routing.weights.shape[-1] for slot, routing in module.context.records.items()}
    assert found == {slot: 2 if "layers.0" in slot else 3 for slot in module.adapted}


def test_dropout_is_the_adapters_and_not_the_routers():
    module = mixture(MoLA, experts=E, rank=R, dropout=0.5, top_k=1)
    module.context.recording = True
    layer, x = module.adapted[UP].train(), tokens(module, UP)
    module.begin(random_batch())
    one, two = layer(x), layer(x)
    assert not torch.equal(one, two)
    weights = module.context.records[UP].weights
    torch.testing.assert_close(weights, layer.router.rule(x @ layer.router.weight.T))


@pytest.mark.parametrize(
    "own, arguments, message",
    [
        (MoLA, {"experts": [2, 0]}, r"^experts: \[2, 0\] must be at least 1"),
        (MoLA, {"rank": []}, r"^rank: \[\] must be at least 1"),
        (MoLA, {"alpha": []}, r"^alpha: \[\] must be at least 0"),
        (MoLA, {"top_k": 0}, "^top_k: 0 must be at least 1"),
        (MoLA, {"balance": -0.1}, "^balance: -0.1 is negative"),
        (LoRA, {"alpha": []}, "^alpha: the list is empty"),
        (HydraLoRA, {"router_input": "h"}, "^router_input: 'h' is unknown; use x or Ax"),
        (MoDE, {"rank": [4, 6], "ranks_per_router": 4}, "^ranks_per_router: 4 does not divide rank 6"),
        (SMoRA, {"experts": [16, 4]}, "^top_k: 8 is more than the 4 experts"),
        (SMoRA, {"bias_step": -1.0}, "^bias_step: -1.0 is negative"),
        (LoRAMoE, {"constraint": 0.1}, r"^constraint: 0.1 with knowledge_tasks \[\]"),
        (LoRAMoE, {"knowledge_tasks": ["tone"]}, r"^constraint: 0.0 with knowledge_tasks \['tone'\]"),
        (LoRAMoE, {"constraint": 0.1, "knowledge_tasks": ["tune"]}, "there is no task 'tune'; use some of tone, topic"),
        (LoRAMoE, {"constraint": 0.1, "knowledge_tasks": ["tone"], "experts": [2, 3]}, "must be even"),
        (LoRAMoE, {"delta": 1.0}, "^delta: 1.0 is not between -1 and 1"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(own, arguments, message):
    with pytest.raises(ValueError, match=message) as caught:
        own(backbone=tiny_backbone(), tasks=TASKS, **arguments)
    assert "\n" not in str(caught.value)
