"""AdaptedLinear and its injection: which linears, what they return, what they can be merged into."""

import pytest
import torch
from torch import nn

from moe_peft.context import RoutingContext
from moe_peft.layers.adapted import AdaptedLinear
from moe_peft.layers.factors import DenseFactors
from moe_peft.layers.injection import find_linears, inject
from moe_peft.layers.routers import Router
from moe_peft.methods.lora import LoRA
from tests.tiny import build, come_alive, output, random_batch, tiny_backbone

ATTENTION, MLP = ["q_proj", "k_proj", "v_proj", "o_proj"], ["gate_proj", "up_proj", "down_proj"]


class Fixed(Router):
    """A router that always gives the same core."""

    def __init__(self, core):
        super().__init__()
        self.core = core

    def forward(self, x, h, scores, context, slot):
        return self.core


def layer(core=None, ranks=(3, 3), dropout=0.0):
    torch.manual_seed(0)
    base = nn.Linear(7, 6)
    factors = DenseFactors(7, 6, *ranks)
    nn.init.normal_(factors.B)
    router = None if core is None else Fixed(core)
    return AdaptedLinear(base, factors, router, 1.3, dropout, RoutingContext(), "slot")


def llama():
    torch.manual_seed(0)
    return tiny_backbone().load()


def test_all_linear_is_every_linear_but_the_output_head():
    names = [f"model.layers.{i}.self_attn.{n}" for i in range(2) for n in ATTENTION]
    names += [f"model.layers.{i}.mlp.{n}" for i in range(2) for n in MLP]
    model = llama()
    assert isinstance(model.lm_head, nn.Linear)
    assert sorted(find_linears(model, "all-linear")) == sorted(names)


def test_all_linear_of_a_model_without_head_leaves_none_out():
    torch.manual_seed(0)
    model = tiny_backbone("classifier").load()
    assert find_linears(model, "all-linear") == [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]


def test_suffixes_match_whole_name_parts():
    model = llama()
    both = [f"model.layers.{i}.{n}" for i in range(2) for n in ("self_attn.q_proj", "mlp.down_proj")]
    assert find_linears(model, ["q_proj", "mlp.down_proj"]) == both
    with pytest.raises(ValueError, match=r"\['proj'\] matches no linear"):
        find_linears(model, ["q_proj", "proj"])


def test_a_regular_expression_must_match_the_whole_name():
    model = llama()
    assert find_linears(model, r".*layers\.1\..*(q|v)_proj") == [
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.self_attn.v_proj",
    ]
    with pytest.raises(ValueError, match="q_proj"):
        find_linears(model, "q_proj")


def test_no_match_lists_what_there_is():
    listed = "'nothing' matches no linear; this model has down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
    with pytest.raises(ValueError, match=listed):
        find_linears(llama(), "nothing")
    with pytest.raises(ValueError, match=r"\['nope'\] matches no linear"):
        find_linears(llama(), ["q_proj", "nope"])


def test_a_broken_regular_expression_is_one_line():
    with pytest.raises(ValueError, match=r"targets: '\(' is no regular expression") as error:
        find_linears(llama(), "(")
    assert "\n" not in str(error.value)


def test_inject_replaces_exactly_the_targets_in_place():
    model = llama()
    before = dict(model.named_modules())
    found = inject(model, find_linears(model, ["v_proj"]), lambda base, slot: build_layer(base, slot))
    assert list(found) == ["model.layers.0.self_attn.v_proj", "model.layers.1.self_attn.v_proj"]
    for name, module in model.named_modules():
        if isinstance(module, AdaptedLinear):
            assert found[name] is module and module.base is before[name] and module.slot == name
        elif name in before:
            assert module is before[name]
    assert sum(isinstance(m, AdaptedLinear) for m in model.modules()) == 2


def build_layer(base, slot):
    factors = DenseFactors(base.in_features, base.out_features, 2, 2)
    return AdaptedLinear(base, factors, None, 1.0, 0.0, RoutingContext(), slot)


@pytest.mark.parametrize(
    ("core", "ranks"),
    [(None, (3, 3)), (torch.randn(3, generator=torch.Generator().manual_seed(1)), (3, 3)),
     (torch.randn(4, 3, generator=torch.Generator().manual_seed(2)), (3, 4))],
    ids=["identity", "diagonal", "matrix"],
)  # fmt: skip
def test_the_merged_weight_gives_the_forward(core, ranks):
    x = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    # A fixed core has no leading dimensions: as many or one more than x has, so that it broadcasts.
    broadcast = None if core is None else core.double()[None, None]
    adapted = layer(broadcast, ranks).double()
    merged = nn.functional.linear(x, adapted.merged_weight(None if core is None else core.double()), adapted.bias)
    assert (adapted(x) - adapted.base(x)).abs().max() > 0.1
    torch.testing.assert_close(adapted(x), merged, rtol=0, atol=1e-12)


def test_the_merged_weight_keeps_the_bases_dtype_and_is_summed_in_fp32():
    adapted = layer()
    expected = (adapted.base.weight.bfloat16().float() + 1.3 * adapted.factors.B @ adapted.factors.A).bfloat16()
    adapted.base.bfloat16()
    assert torch.equal(adapted.merged_weight(), expected)


def test_delta_is_the_forward_without_the_base():
    x, adapted = torch.randn(2, 5, 7), layer()
    assert adapted.delta(x).abs().max() > 0.1
    torch.testing.assert_close(adapted(x), adapted.base(x) + adapted.delta(x))


def test_the_base_is_frozen_and_readable_through_the_adapter():
    adapted = layer()
    assert adapted.weight is adapted.base.weight and adapted.bias is adapted.base.bias
    assert (adapted.in_features, adapted.out_features) == (7, 6)
    assert not adapted.weight.requires_grad and not adapted.bias.requires_grad


def test_a_disabled_context_gives_the_bare_base():
    x, adapted = torch.randn(2, 5, 7), layer()
    with adapted.context.disabled():
        assert torch.equal(adapted(x), adapted.base(x))
    assert not torch.equal(adapted(x), adapted.base(x))


def test_unequal_ranks_need_a_router():
    with pytest.raises(ValueError, match="slot: factors of ranks 3 and 4 need a router's core"):
        layer(None, (3, 4))


def test_the_router_reads_the_input_before_dropout():
    class Scores(Router):
        def rows(self):
            return torch.eye(7)

        def forward(self, x, h, scores, context, slot):
            self.seen = scores
            return torch.ones_like(h)

    adapted, x = layer(dropout=0.5), torch.randn(2, 5, 7)
    adapted.router = Scores()
    adapted.train()
    first = adapted(x)
    torch.testing.assert_close(adapted.router.seen, x)
    assert not torch.equal(first, adapted(x))


def test_t5_reads_the_weight_of_an_adapted_linear():
    """Its feed-forward casts the hidden states to `wo.weight.dtype`, through the adapter."""
    reads = []
    batch = random_batch(kind="seq2seq")
    module = come_alive(build(LoRA, "seq2seq"), batch)
    weight = AdaptedLinear.weight
    wo = [adapted for slot, adapted in module.adapted.items() if slot.endswith(".wo")]
    assert len(wo) == 4
    spy = property(lambda self: reads.append(self.slot) or weight.fget(self))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AdaptedLinear, "weight", spy)
        output(module, batch)
    assert {adapted.slot for adapted in wo} <= set(reads)
