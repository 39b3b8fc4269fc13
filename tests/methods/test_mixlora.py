"""MixLoRA is the weighted sum of whole FFNs: the model's own FFN, unmodified, run once for each expert in fp64."""

import pytest
import torch
from torch import nn
from torch.func import functional_call
from transformers import AutoConfig, AutoModel

from moe_peft.backbones import CausalLM
from moe_peft.layers.ffn_mixtures import ffns
from moe_peft.methods.mixlora import MixLoRA
from moe_peft.methods.mixlora_linear import MixLoRALinear
from tests.methods.test_lora import OPT
from tests.methods.tiny_mixtures import KINDS, mixture
from tests.tiny import build, come_alive, logits, output, random_batch, randomise, tiny_backbone

E, R, K = 4, 3, 2
LLAMA_FFN = "model.layers.1.mlp"


class Chain(nn.Sequential):
    """BERT's FFN, whose halves lie in two modules."""


def gated_t5():
    backbone = tiny_backbone("seq2seq")
    backbone.shape = backbone.shape | {"feed_forward_proj": "gated-gelu"}
    return backbone


def ffn_of(model, kind):
    """An FFN, and the names of its linears with what they are called in the model; the router's first."""
    if kind == "classifier":
        block, name = model.encoder.layer[1], "encoder.layer.1"
        own = {"0.dense": f"{name}.intermediate.dense", "1": f"{name}.output.dense"}
        return Chain(block.intermediate, block.output.dense), own
    name = LLAMA_FFN if kind == "causal" else "decoder.block.1.layer.2.DenseReluDense"
    part = model.get_submodule(name)
    own = [leaf for leaf in ("gate_proj", "up_proj", "down_proj", "wi", "wi_0", "wi_1", "wo") if hasattr(part, leaf)]
    return part, {leaf: f"{name}.{leaf}" for leaf in own}


def of_expert(module, plain, own, expert, x):
    """Runs the plain FFN with an expert's weights."""
    weights = {}
    for leaf, slot in own.items():
        layer = module.adapted[slot]
        a, b = layer.factors.A.split(R)[expert], layer.factors.B.split(R, 1)[expert]
        weights[f"{leaf}.weight"] = plain.get_submodule(leaf).weight + layer.scale * b @ a
    return functional_call(plain, weights, (x,))


def summed(module, plain, own, x):
    """Σ_e g_e FFN_e(x), g the softmax over the K largest scores."""
    scores = x @ module.adapted[next(iter(own.values()))].router.weight.T
    kept = scores.topk(K)
    g = torch.zeros_like(scores).scatter(-1, kept.indices, kept.values.exp())
    g = g / g.sum(-1, keepdim=True)
    return sum(g[..., e : e + 1] * of_expert(module, plain, own, e, x) for e in range(E))


def pair(kind, own=MixLoRA, backbone=None, **options):
    """A mixture in fp64 and the plain model."""
    arguments = {"experts": E, "rank": R, "top_k": K, "alpha": 6.0} | options
    module = build(own, kind, backbone=backbone() if backbone else None, **arguments)
    randomise(module)
    torch.manual_seed(0)
    plain = (backbone() if backbone else tiny_backbone(kind)).load().double().eval().requires_grad_(False)
    return module.double(), plain


@pytest.mark.parametrize("kind, backbone", [*((kind, None) for kind in KINDS), ("seq2seq", gated_t5)])
def test_an_ffn_is_the_weighted_sum_of_its_experts_with_its_gradients(kind, backbone):
    module, base = pair(kind, backbone=backbone)
    mixed, own = ffn_of(module.model, kind)
    plain, _ = ffn_of(base, kind)
    assert len(own) == {None: 3 if kind == "causal" else 2, gated_t5: 3}[backbone]
    x = torch.randn(2, 3, 32, dtype=torch.float64, requires_grad=True)
    trained = [module.adapted[slot].get_parameter(f"factors.{name}") for slot in own.values() for name in "AB"]
    trained += [module.adapted[next(iter(own.values()))].router.weight, x]
    upstream = torch.linspace(-1, 1, 2 * 3 * 32, dtype=torch.float64).view(2, 3, 32)
    found, expected = mixed(x), summed(module, plain, own, x)
    assert (found - plain(x)).abs().max() > 0.1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    gradients = [torch.autograd.grad(y, trained, upstream) for y in (found, expected)]
    for one, other in zip(*gradients, strict=True):
        assert other.abs().max() > 1e-3
        torch.testing.assert_close(one, other, rtol=0, atol=1e-11)


def test_the_attention_is_a_lora():
    module, _ = pair("causal")
    layer, x = module.adapted["model.layers.0.self_attn.q_proj"], torch.randn(2, 3, 32, dtype=torch.float64)
    a, b = layer.factors()
    assert a.shape == (R, 32)
    torch.testing.assert_close(layer(x) - layer.base(x), 2.0 * x @ a.T @ b.T)


def test_every_base_product_is_made_once_per_token():
    module, _ = pair("causal")
    seen = []
    for slot in ffn_of(module.model, "causal")[1].values():
        module.adapted[slot].base.register_forward_hook(lambda base, args, y: seen.append(args[0].shape[:-1].numel()))
    module.model.get_submodule(LLAMA_FFN)(torch.randn(2, 3, 32, dtype=torch.float64))
    assert seen == [6, 6, 6]


@pytest.mark.parametrize("kind", KINDS)
def test_with_one_expert_for_a_token_the_linear_form_is_the_same(kind):
    exact, _ = pair(kind, top_k=1)
    linear, _ = pair(kind, MixLoRALinear, top_k=1)
    batch = random_batch(kind=kind)
    with torch.no_grad():
        torch.testing.assert_close(output(linear, batch), output(exact, batch), rtol=0, atol=1e-10)
        exact, linear = pair(kind)[0], pair(kind, MixLoRALinear)[0]
        assert (output(linear, batch) - output(exact, batch)).abs().max() > 1e-3


def test_the_linear_form_mixes_linear_by_linear_with_the_first_ones_weights():
    module, plain = pair("causal", MixLoRALinear)
    own = ffn_of(module.model, "causal")[1]
    x = torch.randn(2, 3, 32, dtype=torch.float64)
    scores = x @ module.adapted[own["gate_proj"]].router.weight.T
    kept = scores.topk(K)
    g = torch.zeros_like(scores).scatter(-1, kept.indices, kept.values.softmax(-1))

    def linear(leaf, h):
        layer, y = module.adapted[own[leaf]], plain.get_submodule(own[leaf])(h)
        experts = zip(layer.factors.A.split(R), layer.factors.B.split(R, 1), strict=True)
        return y + 2.0 * sum(g[..., e : e + 1] * (h @ a.T @ b.T) for e, (a, b) in enumerate(experts))

    expected = linear("down_proj", nn.functional.silu(linear("gate_proj", x)) * linear("up_proj", x))
    torch.testing.assert_close(module.model.get_submodule(LLAMA_FFN)(x), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("own", [MixLoRA, MixLoRALinear])
def test_a_choice_does_not_outlive_its_ffn(own):
    batch = random_batch()
    module = come_alive(build(own, experts=E, rank=R), batch, scale=0.2)
    options = {"use_reentrant": False, "context_fn": module.context.checkpoint_fns}
    module.model.gradient_checkpointing_enable(options)
    for block in module.model.model.layers:
        block.training = True
    module(batch).sum().backward()
    assert all(role.choice.weights is None for role in module.roles.values())


def test_each_copys_adapter_has_dropout_of_its_own_and_the_router_none():
    module, _ = pair("causal", dropout=0.5, experts=2)
    module.train().context.recording = True
    batch = random_batch()
    recorded = []
    for _ in range(2):
        module.begin(batch)
        x = torch.ones(2, 3, 32, dtype=torch.float64)
        recorded.append((module.model.get_submodule(LLAMA_FFN)(x), dict(module.context.records)))
    (one, first), (other, second) = recorded
    assert not torch.equal(one, other)
    assert set(first) == {f"{LLAMA_FFN}.gate_proj"}
    torch.testing.assert_close(first, second)


def test_a_base_in_half_precision_starts_to_the_bit():
    backbone = tiny_backbone()
    backbone.dtype = "bfloat16"
    module, batch = build(MixLoRA, backbone=backbone).eval(), random_batch()
    with torch.no_grad(), module.context.disabled():
        bare = logits(module, batch)
    assert bare.dtype == torch.bfloat16 and torch.equal(logits(module, batch), bare)


def test_a_model_whose_ffns_get_tokens_without_rows_is_served_and_balanced():
    backbone, batch = CausalLM("opt", dtype="float32", shape=OPT, random_weights=True), random_batch()
    module = come_alive(build(MixLoRA, backbone=backbone, experts=E, rank=R, balance=1.0), batch, scale=0.2)
    with torch.no_grad():
        for at, row in enumerate(module(batch)):
            alone = {
                key: value[at : at + 1] if isinstance(value, torch.Tensor) else value for key, value in batch.items()
            }
            torch.testing.assert_close(module(alone)[0], row, rtol=1e-4, atol=1e-4)
    module.begin(batch)
    assert 1 <= module.step_losses(batch)["balance"].item() < E


@pytest.mark.parametrize(
    "family, entries",
    [
        ("llama", 2),
        ("qwen2", 2),
        ("gemma2", 2),
        ("phi3", 1),
        ("phi", 1),
        ("gpt_neox", 1),
        ("bloom", 1),
        ("falcon", 1),
        ("roberta", 1),
        ("deberta-v2", 1),
        ("distilbert", 1),
        ("modernbert", 1),
        ("t5", 1),
        ("bart", 1),
        ("mpt", 1),
    ],
)
def test_the_ffns_of_a_family_are_found(family, entries):
    with torch.device("meta"):
        config = AutoConfig.for_model(family)
        model = AutoModel.from_config(config)
    linears = [name for name, part in model.named_modules() if isinstance(part, nn.Linear)]
    found = ffns(linears)
    assert {len(starts) for starts in found.values()} == {entries}
    layers = config.num_hidden_layers
    decoder = {"t5": "num_decoder_layers", "bart": "decoder_layers"}.get(family)
    assert len(found) == layers + (getattr(config, decoder) if decoder else 0)


@pytest.mark.parametrize(
    "targets, message",
    [
        (["q_proj", "v_proj"], "adapts no FFN, which are the experts of MixLoRA"),
        (["q_proj", "gate_proj", "down_proj"], "^targets: model.layers.0.mlp.up_proj not adapted with the rest"),
        (["gate_proj", "up_proj"], "^targets: model.layers.0.mlp.down_proj not adapted with the rest"),
        (["down_proj"], "gate_proj, model.layers.0.mlp.up_proj not adapted with the rest"),
    ],
)
def test_parts_of_an_ffn_are_refused_in_one_line(targets, message):
    with pytest.raises(ValueError, match=message) as caught:
        build(MixLoRA, targets=targets)
    assert "\n" not in str(caught.value)


def test_ffns_alone_may_be_adapted_in_some_layers():
    module = build(MixLoRA, targets=r".*layers\.1\.mlp\..*")
    assert len(module.adapted) == 3


def test_a_linear_that_is_called_without_the_first_of_its_ffn_says_so():
    module = mixture(MixLoRA)
    with pytest.raises(ValueError, match="^model.layers.0.mlp.up_proj: the first linear of its FFN decides"):
        module.adapted["model.layers.0.mlp.up_proj"](torch.zeros(1, 1, 32, dtype=torch.float64))
