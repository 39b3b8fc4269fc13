"""MultiLoRA: parallel LoRAs, scaled per output."""

import torch

from moe_peft.interop.peft import low_rank
from moe_peft.methods.multi_lora import MultiLoRA
from tests.methods.tiny_tasks import agrees, alive_layer, by_row, gradients
from tests.tiny import build, random_batch

OPTIONS = {"experts": 3, "rank": 2, "alpha": 4.0}


def test_the_update_is_the_sum_of_the_scaled_loras():
    _, layer, x, tasks = alive_layer(MultiLoRA, **OPTIONS)
    a, b, scales = layer.factors.A, layer.factors.B, layer.factors.scales
    pairs = [(torch.diag(scales[e]) @ b[:, 2 * e : 2 * e + 2], a[2 * e : 2 * e + 2]) for e in range(3)]
    agrees(layer, x, by_row(lambda task: 4 / 2 * sum(up @ down for up, down in pairs), x, tasks))


def test_the_zero_start_is_in_the_scales_which_alone_learn_first():
    module = build(MultiLoRA, **OPTIONS)
    for layer in module.adapted.values():
        assert layer.factors.scales.abs().max() == 0 < layer.factors.B.abs().mean()
        assert 0.6 < layer.factors.B.abs().max() <= 2**-0.5
    for name, gradient in gradients(module, random_batch()).items():
        assert (gradient.abs().max() > 0) == name.endswith("scales"), name


def test_it_is_exported_as_one_lora_of_all_ranks():
    module, layer, _, _ = alive_layer(MultiLoRA, **OPTIONS)
    assert not layer.depends_on_task
    found = low_rank(layer, None)
    assert (found.a.shape, found.b.shape) == ((6, 32), (16, 6))
    weight = layer.base.weight.clone()
    module.merge()
    torch.testing.assert_close(layer.weight - weight, found.scale * found.b @ found.a, rtol=0, atol=1e-12)
