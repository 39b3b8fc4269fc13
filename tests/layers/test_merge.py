"""Merging one adapted linear: exact both ways, and nothing but a plain linear in between."""

import pytest
import torch
from torch import nn

from moe_peft.context import RoutingContext
from moe_peft.layers.adapted import AdaptedLinear
from moe_peft.layers.factors import DenseFactors

X = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(3))


def layer(dtype=torch.float32):
    torch.manual_seed(0)
    base = nn.Linear(7, 6, dtype=dtype)
    factors = DenseFactors(7, 6, 3, 3)
    nn.init.normal_(factors.B)
    return AdaptedLinear(base, factors, None, 1.3, 0.0, RoutingContext(), "blocks.0.up").eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unmerging_restores_the_base_to_the_bit(dtype):
    adapted = layer(dtype)
    weight, before = adapted.base.weight, adapted.base.weight.clone()
    adapted.merge()
    assert not torch.equal(adapted.base.weight, before)
    adapted.unmerge()
    assert adapted.base.weight is weight and torch.equal(weight, before)
    assert not adapted.merged and adapted.base.weight.dtype == dtype


@pytest.mark.parametrize("core", [None, torch.tensor([2.0, 0.5, 0.0])], ids=["identity", "diagonal"])
def test_the_merged_forward_is_the_plain_linear_of_the_merged_weight(core):
    adapted = layer()
    weight = adapted.merged_weight(core)
    adapted.merge(core)
    assert torch.equal(adapted(X), nn.functional.linear(X, weight, adapted.bias))
    assert torch.equal(adapted.merged_weight(core), weight)  # of the true base, not of the merged one


def test_a_merged_layer_gives_its_own_forward():
    adapted = layer()
    own, bare = adapted(X), adapted.base(X)
    adapted.merge()
    assert (own - bare).abs().max() > 0.1
    torch.testing.assert_close(adapted(X), own, rtol=0, atol=1e-5)


def test_a_disabled_context_gives_the_true_base_while_merged():
    adapted = layer()
    bare = adapted.base(X)
    adapted.merge()
    with adapted.context.disabled():
        assert torch.equal(adapted(X), bare)
    assert not torch.equal(adapted(X), bare)


def test_merging_twice_is_refused():
    adapted = layer()
    adapted.merge()
    weight = adapted.base.weight.clone()
    with pytest.raises(ValueError, match=r"^blocks\.0\.up is merged already: call unmerge\(\) first$"):
        adapted.merge()
    assert torch.equal(adapted.base.weight, weight)


def test_unmerging_what_is_not_merged_is_refused():
    adapted = layer()
    with pytest.raises(ValueError, match=r"^blocks\.0\.up is not merged"):
        adapted.unmerge()
    adapted.merge()
    adapted.unmerge()
    with pytest.raises(ValueError, match="is not merged"):
        adapted.unmerge()


def test_training_while_merged_is_refused():
    adapted = layer()
    adapted.merge()
    adapted.train()
    with pytest.raises(ValueError, match=r"blocks\.0\.up is merged, .* call unmerge\(\) before training"):
        adapted(X)
    adapted.unmerge()
    adapted(X)


def test_the_kept_base_moves_with_the_layer():
    adapted = layer()
    adapted.merge()
    adapted.to("meta")
    adapted.unmerge()
    assert adapted.base.weight.is_meta and not adapted.base.weight.requires_grad
