"""The table of folded experts: the same outputs, the most recently used stay, and the byte limit is kept."""

import pytest
import torch
from torch import nn

from moe_peft.layers.expert_cache import NULL, ExpertCache
from tests.layers.tiny_experts import (
    LINE,
    D,
    E,
    R,
    agree,
    begin,
    cached,
    expected,
    experts,
    inputs,
    run,
    served,
    table_bytes,
)


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def folds(cache, monkeypatch):
    """The experts that are folded from here on, batch by batch."""
    seen, fold = [], cache.layers[0].fold
    monkeypatch.setattr(cache.layers[0], "fold", lambda chosen: seen.append(chosen.tolist()) or fold(chosen))
    return seen


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_outputs_with_and_without_the_table_are_equal(dtype):
    cache, layers = cached(dtype=dtype)
    chosen = [2, 0, NULL, 2, 3]
    outputs, line = run(cache, chosen)
    assert line is not None
    for layer, found in zip(layers, outputs, strict=True):
        begin(layer.context, chosen)
        without = layer(inputs(5, dtype=dtype))
        assert (without - layer.base(inputs(5, dtype=dtype))).abs().max() > 0.5
        assert torch.equal(found, without) and found.dtype == dtype


def test_rows_get_their_experts_out_of_the_table():
    cache, layers = cached()
    served(cache, [2, 0, 3, 2, 1, 0])
    assert all(part.shape[0] == E + 1 for layer in layers for part in layer.table)
    for layer in layers:
        for part in layer.table:
            part.zero_()
    outputs, _ = run(cache, [2, 0])
    for layer, found in zip(layers, outputs, strict=True):
        assert torch.equal(found, layer.base(inputs(2)))  # so it is the table indeed that serves


def test_an_expert_is_folded_once(monkeypatch):
    cache, _ = cached()
    seen = folds(cache, monkeypatch)
    for chosen in ([2, 0, 2], [0, 0], [3, 2, 0], [2, 3]):
        served(cache, chosen)
    assert seen == [[0, 2], [3]]


def test_the_least_recently_used_expert_makes_room(monkeypatch):
    cache, _ = cached(room=3)
    seen = folds(cache, monkeypatch)
    served(cache, [0])
    served(cache, [1])
    first = served(cache, [2])
    served(cache, [0])  # used last: 1, 2, 0
    assert served(cache, [3, 2]) != first  # takes the line of 1
    assert seen == [[0], [1], [2], [3]]
    served(cache, [0, 2, 3])
    assert len(seen) == 4
    served(cache, [1])  # takes the line of one of the three
    assert seen[4:] == [[1]]


def test_experts_of_the_batch_are_never_the_ones_to_go(monkeypatch):
    cache, _ = cached(room=3)
    seen = folds(cache, monkeypatch)
    for expert in (0, 1, 2):
        served(cache, [expert])
    served(cache, [3, 0])  # 0 is the oldest, and wanted
    served(cache, [0, 3])
    assert seen == [[0], [1], [2], [3]]


@pytest.mark.parametrize(("count", "room"), [(200, 3), (E, 1), (E, E), (E, 50)])
def test_tables_keep_the_limit_to_the_byte(count, room):
    cache, _ = cached(room, count)
    assert cache.capacity() == min(room, count)
    step = min(room, count)
    for start in range(0, count, step):
        served(cache, [min(start + i, count - 1) for i in range(step)])
        assert 0 < table_bytes(cache) == LINE * (min(room, count) + 1) <= cache.limit


def test_one_byte_less_is_room_for_one_less():
    cache, _ = cached(room=3)
    cache.limit -= 1
    assert cache.capacity() == 2
    served(cache, [0, 1])
    assert table_bytes(cache) == LINE * 3


def test_the_limit_counts_in_the_bases_dtype():
    cache, _ = cached(room=3, count=200, dtype=torch.bfloat16)
    assert cache.capacity() == 4 * 4 - 1  # four times as many lines of a quarter of the size
    run(cache, list(range(15)))
    assert table_bytes(cache) == cache.limit


@pytest.mark.parametrize("room", [3, 0])
def test_more_experts_than_fit_are_served_without_the_table(room):
    cache, layers = cached(room)
    chosen = [0, 1, 2, 3, NULL]
    outputs, line = run(cache, chosen)
    assert line is None
    for layer, found in zip(layers, outputs, strict=True):
        agree(found, expected(layer, inputs(5), chosen))
        assert torch.equal(found[4], layer.base(inputs(5))[4])
    if room:
        served(cache, [0, 1, 2])


@pytest.mark.parametrize("room", [0, -1])
@pytest.mark.parametrize("chosen", [[0], [NULL, NULL]])
def test_without_room_nothing_is_kept(room, chosen):
    cache, layers = cached(room)
    outputs, line = run(cache, chosen)
    assert cache.capacity() == 0 and line is None and table_bytes(cache) == 0
    for layer, found in zip(layers, outputs, strict=True):
        agree(found, expected(layer, inputs(len(chosen)), chosen))


def test_without_the_table_no_folded_expert_outlives_its_layer():
    cache, layers = cached(room=0)
    run(cache, [0, 1])
    assert all(not layer.context._held for layer in layers)


def test_the_null_experts_line_is_zero_and_stays_so():
    cache, layers = cached(room=2)
    assert served(cache, [NULL, 1, NULL])[::2] == [0, 0]
    for chosen in ([2, 3], [NULL], [0, 1], [NULL, 3]):
        served(cache, chosen)
        assert not any(part[0].any() for layer in layers for part in layer.table)


def test_a_batch_of_null_rows_needs_no_expert(monkeypatch):
    cache, layers = cached()
    seen = folds(cache, monkeypatch)
    assert served(cache, [NULL, NULL, NULL]) == [0, 0, 0] and not seen
    assert served(cache, [0]) == [1]
    outputs, _ = run(cache, [NULL, NULL])
    for layer, found in zip(layers, outputs, strict=True):
        assert torch.equal(found, layer.base(inputs(2)))


def test_experts_of_several_sizes_share_their_lines():
    cache, layers = cached()
    small = experts(E, seed=7)
    small.factors.rank_in = small.factors.rank_out = 2
    for at, core in enumerate(small.factors.cores):
        a, b = (2 if side == R else side for side in (core.shape[1], core.shape[3]))
        small.factors.cores[at] = nn.Parameter(core[:, :a, :, :b].clone())
    cache = ExpertCache([*layers, small], 10 * LINE)
    served(cache, [3, 0, NULL])
    assert small.table[0].shape == (E + 1, 2, D)


def test_lines_lie_where_the_choice_lies():
    cache, _ = cached()
    chosen = torch.tensor([2, 1, NULL])
    line = cache.lines(chosen)
    assert line.device == chosen.device and line.dtype == torch.int64 and line.shape == (3,)


def test_clear_forgets_experts_and_gives_the_memory_back(monkeypatch):
    cache, _ = cached()
    served(cache, [0])
    cache.clear()
    assert table_bytes(cache) == 0
    seen = folds(cache, monkeypatch)
    served(cache, [0])
    assert seen == [[0]]
