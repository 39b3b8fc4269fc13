"""What makes the table of folded experts forget: changed cores, training, another dtype; and where there is none."""

import pytest
import torch
from torch import nn
from torch.distributed import HashStore, destroy_process_group, init_process_group
from torch.distributed.tensor import Replicate, distribute_tensor, init_device_mesh

from tests.layers.tiny_experts import LAYERS, E, agree, cached, expected, inputs, run, served, table_bytes


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def in_place(layer):
    layer.factors.cores[1].mul_(3)


def one_expert_in_place(layer):
    layer.factors.cores[-1][2].neg_()


def loaded(layer):
    state = {name: 2 * value for name, value in layer.factors.state_dict().items()}
    layer.factors.load_state_dict(state)


def assigned(layer):
    state = {name: 2 * value for name, value in layer.factors.state_dict().items()}
    layer.factors.load_state_dict(state, assign=True)


def replaced(layer):
    layer.factors.cores[0] = nn.Parameter(layer.factors.cores[0] * 2)


def other_data(layer):
    layer.factors.cores[0].data = layer.factors.cores[0].data * 2


def in_inference_mode(layer):
    with torch.inference_mode():
        layer.factors.cores[0].mul_(2)


CHANGES = [in_place, one_expert_in_place, loaded, assigned, replaced, other_data, in_inference_mode]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("at", range(LAYERS))
def test_changed_cores_are_seen(change, at):
    cache, layers = cached()
    served(cache, [2, 1])
    before = layers[at](inputs(2))
    change(layers[at])
    served(cache, [2, 1])
    assert (layers[at](inputs(2)) - before).abs().max() > 0.5


def test_a_core_replaced_twice_is_seen_although_its_address_is_used_again():
    cache, layers = cached()
    for _ in range(20):
        served(cache, [2, 1])
        for _ in range(2):
            layers[0].factors.cores[0] = nn.Parameter(torch.randn_like(layers[0].factors.cores[0]))


def test_a_bank_that_grew_gets_new_tables():
    cache, layers = cached(room=10)
    served(cache, [2, 1])
    for layer in layers:
        for at, core in enumerate(layer.factors.cores):
            layer.factors.cores[at] = nn.Parameter(torch.cat([core, torch.randn_like(core[:1])]))
        layer.factors.experts = E + 1
    served(cache, [E, 1])
    assert cache.capacity() == E + 1


@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": True}])
def test_an_optimizers_step_is_seen(options):
    cache, layers = cached()
    optimizer = torch.optim.AdamW([core for layer in layers for core in layer.factors.cores], lr=0.1, **options)
    served(cache, [2, 1])
    with torch.enable_grad():
        outputs, line = run(cache, [2, 1])
        assert line is None
        sum(y.square().sum() for y in outputs).backward()
    optimizer.step()
    served(cache, [2, 1])


def test_training_gives_the_memory_back():
    cache, _ = cached()
    served(cache, [2, 1])
    with torch.enable_grad():
        assert cache.lines(torch.tensor([2, 1])) is None
    assert table_bytes(cache) == 0


def test_another_dtype_gives_tables_of_that_dtype():
    cache, layers = cached()
    served(cache, [2, 1])
    for layer in layers:
        layer.to(torch.float32)
    outputs, line = run(cache, [2, 1])
    assert line is not None and all(part.dtype == torch.float32 for layer in layers for part in layer.table)
    for layer, found in zip(layers, outputs, strict=True):
        agree(found, expected(layer, inputs(2, dtype=torch.float32), [2, 1]), 1e-4)


def test_a_low_precision_base_keeps_its_cores_and_rounds_once():
    cache, layers = cached(dtype=torch.float32)
    for layer in layers:
        layer.base.bfloat16()
    run(cache, [2, 1])
    a, b = layers[0].fold(torch.tensor([2]))
    line = cache.lines(torch.tensor([2]))
    for table, folded in zip(layers[0].table, (a, b.mT), strict=True):
        assert torch.equal(table[line], folded.bfloat16())


def test_tables_made_in_inference_mode_serve_outside_of_it_and_the_other_way_round():
    cache, _ = cached()
    for mode, chosen in ((True, [0]), (False, [1]), (True, [2, 0]), (False, [3, 1])):
        with torch.inference_mode() if mode else torch.no_grad():
            served(cache, chosen)


def test_sharded_cores_are_left_to_the_models_own_forward():
    cache, layers = cached()
    served(cache, [0])
    init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for layer in layers:
            for at, core in enumerate(layer.factors.cores):
                layer.factors.cores[at] = nn.Parameter(distribute_tensor(core, mesh, [Replicate()]))
        assert cache.lines(torch.tensor([1])) is None and table_bytes(cache) == 0
    finally:
        destroy_process_group()
