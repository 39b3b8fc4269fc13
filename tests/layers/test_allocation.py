"""Numbers by layer: which layers a list's entries reach."""

import pytest

from moe_peft.layers.allocation import Place, at_least, places


def by_layer(values, layers):
    return [Place(layer, layers).of(values) for layer in range(layers)]


@pytest.mark.parametrize("layers, runs", [(32, [8, 8, 8, 8]), (30, [8, 7, 8, 7]), (4, [1, 1, 1, 1]), (5, [2, 1, 1, 1])])
def test_a_list_is_spread_evenly_over_the_layers(layers, runs):
    found = by_layer([2, 4, 6, 8], layers)
    assert found == sorted(found)
    assert [found.count(value) for value in (2, 4, 6, 8)] == runs


def test_one_number_is_every_layers():
    assert by_layer(5, 7) == [5] * 7
    assert by_layer([5], 7) == [5] * 7


def test_a_list_of_a_number_for_each_layer_is_those():
    assert by_layer([3, 1, 4, 1, 5], 5) == [3, 1, 4, 1, 5]


def test_the_first_number_in_a_name_is_its_layer():
    names = [f"model.layers.{layer}.mlp.experts.{expert}.w1" for layer in range(12) for expert in range(3)]
    found = places(names)
    assert all(found[name] == Place(int(name.split(".")[2]), 12) for name in names)


def test_encoder_and_decoder_count_apart():
    names = [f"encoder.block.{i}.layer.0.SelfAttention.q" for i in range(4)]
    names += [f"decoder.block.{i}.layer.1.EncDecAttention.q" for i in range(6)]
    found = places(names)
    assert found[names[3]] == Place(3, 4) and found[names[4]] == Place(0, 6) and found[names[-1]] == Place(5, 6)


def test_layers_are_those_that_are_adapted():
    found = places(["h.7.a", "h.3.a", "h.3.b", "embedding.projection", "h.10.a"])
    assert found == {
        "h.7.a": Place(1, 3),
        "h.3.a": Place(0, 3),
        "h.3.b": Place(0, 3),
        "embedding.projection": Place(0, 1),
        "h.10.a": Place(2, 3),
    }


@pytest.mark.parametrize("value", [0, [2, 0], []])
def test_numbers_that_are_too_small_are_refused_by_name(value):
    with pytest.raises(ValueError, match=r"^experts: .* must be at least 1, or a list"):
        at_least("experts", value, 1)
