"""Sums of routing weights against plain loops, whatever is padded, repeated, shared or decided per row."""

import math

import pytest
import torch

from moe_peft.routing.sums import RoutingSums

B, S, E, T = 5, 4, 3, 2
TASKS = torch.tensor([0, 1, 1, 0, 1])


def drawn(*shape):
    """Random weights of either sign."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))


def left_padded():
    """[B, S] masks with 4, 3, 2, 1 and 4 real tokens."""
    return torch.arange(S) >= torch.tensor([0, 1, 2, 3, 0]).unsqueeze(1)


def sums(weights, tasks=TASKS, real=None):
    """The table of one layer."""
    found = RoutingSums(T)
    found.add("layer", weights, tasks, left_padded() if real is None else real)
    return found.layers["layer"]


def loops(weights, real):
    """The same table in plain Python."""
    table = [[0.0] * (2 * E + 1) for _ in range(T)]
    for row in range(B):
        for token in range(weights.shape[1]):
            values = [abs(value) for value in weights[row, token].tolist()]
            if real[row, token] and sum(values):
                shares, own = [value / sum(values) for value in values], table[int(TASKS[row])]
                for expert, share in enumerate(shares):
                    own[expert] += share
                    own[2 * E] -= share * math.log(share) / math.log(E) if share else 0.0
                own[E + shares.index(max(shares))] += 1
    return torch.tensor(table, dtype=torch.float64)


def test_sums_are_those_of_a_loop_over_real_tokens():
    weights = drawn(B, S, E)
    weights[0, 2] = 0.0  # a token that was not routed
    torch.testing.assert_close(sums(weights), loops(weights, left_padded()))
    assert not torch.allclose(sums(weights), loops(weights, torch.ones(B, S)))


def test_a_choice_for_whole_rows_counts_rows():
    weights = drawn(B, 1, E)
    expected = loops(weights, torch.ones(B, 1))
    torch.testing.assert_close(sums(weights), expected)
    torch.testing.assert_close(sums(weights[:, 0]), expected)
    assert expected[:, E : 2 * E].sum(1).tolist() == [2, 3]


def test_rows_without_any_real_token_do_not_count():
    weights, real = drawn(B, 1, E), left_padded()
    real[2] = False
    assert sums(weights, real=real)[:, E : 2 * E].sum(1).tolist() == [2, 2]


def test_a_routing_that_all_rows_share_counts_for_each():
    weights = drawn(1, S, E)
    torch.testing.assert_close(sums(weights), loops(weights.expand(B, -1, -1), left_padded()))


def test_tokens_that_come_without_their_rows_find_them():
    weights = drawn(B, S, E)
    torch.testing.assert_close(sums(weights.flatten(0, 1)), sums(weights))


def test_rows_repeated_for_beams_belong_to_their_tasks():
    weights = drawn(B, S, E)
    torch.testing.assert_close(sums(weights.repeat_interleave(3, 0)), 3 * sums(weights))


def test_tokens_of_another_length_count_with_their_rows():
    weights = drawn(B, S + 2, E)
    torch.testing.assert_close(sums(weights), loops(weights, torch.ones(B, S + 2)))


def test_rows_of_no_task_do_not_count():
    weights = drawn(B, S, E)
    tasks = torch.tensor([0, 1, -1, 0, 1])
    real = left_padded()
    real[2] = False
    torch.testing.assert_close(sums(weights, tasks), sums(weights, real=real))


def test_a_routing_of_other_rows_is_refused():
    with pytest.raises(ValueError, match="layer recorded a routing of 7 rows for a batch of 5"):
        sums(drawn(7, S, E))


def test_batches_add_up():
    weights, real, found, rest = drawn(B, S, E), left_padded(), RoutingSums(T), RoutingSums(T)
    found.add("layer", weights[:2], TASKS[:2], real[:2])
    rest.add("layer", weights[2:], TASKS[2:], real[2:])
    found.update(rest)
    found.join()
    torch.testing.assert_close(found.layers["layer"], sums(weights))
