"""RoAd against Hugging Face PEFT's, its dense matrix, and what pairs of a rotation keep."""

from typing import Any

import pytest
import torch
from torch import nn

from moe_peft.context import RoutingContext
from moe_peft.counting import count_parameters
from moe_peft.interop.peft import export_peft
from moe_peft.methods.road import RoAd, RoadLinear, Rotations
from tests.tiny import build, come_alive, logits, random_batch, randomise
from tests.tiny_counts import meta

VARIANTS = ["road_1", "road_2", "road_4"]


def layer_of(variant, group=8, tasks=1, seed=0, bias=True):
    """An adapted linear 12 -> 32 with random angles and stretches, in fp64."""
    torch.manual_seed(seed)
    factors = Rotations(32, group, variant, tasks)
    layer = RoadLinear(nn.Linear(12, 32, bias=bias), factors, RoutingContext(), "layer").double().eval()
    randomise(layer)
    return layer


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("group", [8, 32])
def test_it_is_pefts(variant, group):
    from peft import RoadConfig, get_peft_model

    layer, x = layer_of(variant, group), torch.randn(3, 5, 12).double()
    base: Any = nn.Sequential()
    base.add_module("layer", nn.Linear(12, 32).double())
    base.layer.load_state_dict(layer.base.state_dict())
    config: Any = RoadConfig(variant=variant, group_size=group, target_modules=["layer"])  # type: ignore[arg-type]
    theirs: Any = get_peft_model(base, config).double()  # type: ignore[arg-type]
    own = theirs.base_model.model.layer
    own.road_theta["default"].data.copy_(layer.factors.theta[0])
    own.road_alpha["default"].data.copy_(layer.factors.alpha[0])
    assert (layer(x) - layer.base(x)).abs().max() > 0.1
    torch.testing.assert_close(layer(x), theirs(x), rtol=0, atol=1e-6)  # theirs multiplies in fp32
    own.merge()
    torch.testing.assert_close(layer.merged_weight(), own.base_layer.weight, rtol=0, atol=1e-6)
    torch.testing.assert_close(layer.merged_bias(), own.base_layer.bias, rtol=0, atol=1e-6)


@pytest.mark.parametrize("bias", [True, False])
def test_a_merged_layer_and_its_bias_are_put_back_to_the_bit(bias):
    layer, x = layer_of("road_4", bias=bias), torch.randn(3, 5, 12).double()
    routed, weight, own_bias = layer(x), layer.base.weight, layer.base.bias
    layer.merge()
    torch.testing.assert_close(layer(x), routed, rtol=0, atol=1e-5)
    torch.testing.assert_close(layer.merged_weight(), layer.base.weight, rtol=0, atol=0)  # not rotated twice
    with layer.context.disabled():
        torch.testing.assert_close(layer(x), nn.functional.linear(x, weight, own_bias), rtol=0, atol=1e-12)
    layer.unmerge()
    assert layer.base.weight is weight and layer.base.bias is own_bias


def test_a_plain_rotation_keeps_the_length_of_every_pair():
    layer, x = layer_of("road_1"), torch.randn(3, 5, 12).double()
    layer.factors.alpha.data.fill_(1.0)

    def lengths(z):
        first, second = z.unflatten(-1, (-1, 2, 4)).unbind(-2)
        return first.square() + second.square()

    torch.testing.assert_close(lengths(layer(x)), lengths(layer.base(x)), rtol=1e-10, atol=1e-12)


def test_every_row_has_its_own_tasks_rotation():
    layer, x = layer_of("road_2", tasks=3), torch.randn(4, 5, 12).double()
    tasks = torch.tensor([2, 0, 1, 2])
    ids = torch.arange(20).view(4, 5)
    layer.context.put("task_id", tasks, layer.context.begin(ids, torch.ones_like(ids)))
    alone = layer_of("road_2")
    alone.base = layer.base
    for row, task in enumerate(tasks):
        for name in ("theta", "alpha"):
            getattr(alone.factors, name).data.copy_(getattr(layer.factors, name)[task])
        torch.testing.assert_close(layer(x)[row], alone(x[row]), rtol=0, atol=1e-12)


def test_tasks_of_a_mixed_batch_are_merged_one_by_one():
    module, batch = build(RoAd, variant="road_1", per_task=True), random_batch()
    come_alive(module, batch, scale=0.5).eval()
    with torch.no_grad():
        routed = logits(module, batch)
        assert (routed - logits(module, batch | {"task_id": 1 - batch["task_id"]})).abs().max() > 0.01
        for task in range(2):
            own = batch["task_id"] == task
            module.merge(task)
            merged = logits(module, batch | {"task_id": torch.full_like(batch["task_id"], task)})
            torch.testing.assert_close(merged[own], routed[own], rtol=0, atol=1e-4)
            module.unmerge()


def test_rows_without_a_task_are_refused_where_tasks_differ():
    module, batch = build(RoAd, per_task=True), random_batch()
    del batch["task_id"]
    with pytest.raises(ValueError, match="RoAd routes by task: the batch has no task_id"):
        module(batch)


def test_a_group_that_does_not_divide_the_outputs_is_refused():
    with pytest.raises(ValueError, match=r"group_size: 24 is no even divisor of the 32 outputs of .*q_proj"):
        build(RoAd, group_size=24)
    with pytest.raises(ValueError, match="variant: 'road_3' is unknown; use road_1, road_2 or road_4"):
        build(RoAd, variant="road_3")


def test_an_export_as_lora_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="it transforms outputs, which is no LoRA; export it to merged or adapter"):
        export_peft(build(RoAd), tmp_path / "lora", "tone")
    assert not (tmp_path / "lora").exists()


@pytest.mark.parametrize("variant, trainable", zip(VARIANTS, [1_359_872, 2_719_744, 5_439_488], strict=True))
def test_counts(variant, trainable):
    assert count_parameters(meta("road", variant=variant))["trainable"] == trainable


def test_half_precision_keeps_small_stretches():
    factors = Rotations(32, 8, "road_1")
    factors.alpha.data.fill_(1.0 + 2**-8)  # 1 in bf16
    layer = RoadLinear(nn.Linear(12, 32, dtype=torch.bfloat16), factors, RoutingContext(), "layer")
    z = torch.full((1, 1, 32), 1.5, dtype=torch.bfloat16)
    assert torch.equal(layer.transform(z), torch.full_like(z, 1.5 + 2**-7))
