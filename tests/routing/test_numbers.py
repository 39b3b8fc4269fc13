"""What is said of sums whose answer is known: even and certain routers, dead and collapsed ones, maps and bins."""

import numpy as np
import pytest
import torch

from moe_peft.routing.numbers import Asked, confidence_bins, findings, measure, overall, project
from moe_peft.routing.sums import RoutingSums


def use_of(*tasks, names=None, task_decides=False):
    """The numbers of a layer whose tokens have the given weights, by task."""
    sums = RoutingSums(len(tasks))
    for task, tokens in enumerate(tasks):
        weights = torch.tensor([tokens], dtype=torch.float64)
        if weights.numel():
            sums.add("layer", weights, torch.tensor([task]), torch.ones(weights.shape[:2], dtype=torch.bool))
    experts = next(len(token) for tokens in tasks for token in tokens)
    return measure(sums.layers["layer"].numpy(), names or list(map(str, range(experts))), task_decides)


def test_an_even_router_tells_nothing():
    use = use_of([[1, 1, 1, 1]] * 3, [[2, 2, 2, 2]])
    assert use.entropy == pytest.approx(1) and use.mutual_information == pytest.approx(0)
    assert use.weight.tolist() == [[0.25] * 4] * 2 and use.tokens.tolist() == [3, 1]
    assert not use.dead and use.collapsed is None


def test_an_expert_per_task_tells_all():
    use = use_of([[1, 0, 0]] * 5, [[0, 1, 0]])
    assert use.entropy == 0 and use.mutual_information == pytest.approx(1)
    assert use.share.tolist() == [0.5, 0.5, 0], "every task counts alike, however many tokens it has"


def test_mutual_information_of_a_known_channel():
    use = use_of([[0.9, 0.1]], [[0.1, 0.9]])
    assert use.mutual_information == pytest.approx(1 + 0.9 * np.log2(0.9) + 0.1 * np.log2(0.1))


def test_one_task_has_no_information_to_share():
    assert use_of([[1, 0], [0, 1]]).mutual_information == 0


def test_a_task_without_tokens_is_left_out():
    use = use_of([[1, 0]], [], [[0, 1]])
    assert use.mutual_information == pytest.approx(1) and use.tokens.tolist() == [1, 0, 1]
    assert np.isnan(use.weight[1]).all() and use.share.tolist() == [0.5, 0.5]


@pytest.mark.parametrize("weight, chosen, dead", [(0.002, False, [2]), (0.01, False, []), (0.0, True, [])])
def test_an_expert_is_dead_that_has_little_weight_and_no_token(weight, chosen, dead):
    tokens = [[0.6 - weight, 0.4, weight]] * 999 + [[0, 0, 1] if chosen else [1, 0, 0]]
    assert use_of(tokens, tokens[:999]).dead == dead


def test_a_null_expert_is_never_dead():
    assert use_of([[0.5, 0.5, 0]], names=["tone", "next", "none"]).dead == []


def test_a_layer_has_collapsed_that_one_expert_takes_all_of():
    assert use_of([[0.96, 0.04]], [[0.96, 0.04]]).collapsed == 0
    assert use_of([[0.96, 0.04]], [[0.9, 0.1]]).collapsed is None
    assert use_of([[1.0]], [[1.0]]).collapsed is None, "one expert is no choice"


def test_tasks_that_are_routed_as_a_whole_leave_no_expert_dead():
    assert use_of([[1, 0, 0]], [[0, 1, 0]], task_decides=True).dead == []
    assert use_of([[1, 0, 0]], [[1, 0, 0]], task_decides=True).collapsed == 0
    assert use_of([[1, 0, 0]], task_decides=True).collapsed is None, "one task must choose something"


def test_findings_name_layer_expert_and_remedy():
    uses = {"a": use_of([[1, 1, 0]], names=["0,0", "0,1", "0,2"]), "b": use_of([[0, 1, 0]])}
    dead, collapsed = findings(uses)
    assert dead[:4] == ("dead", "a", "0,2", 0.0) and collapsed[:4] == ("collapsed", "b", "1", 1.0)
    assert "Expert 0,2 of a is dead: it has 0.00% of the weight (an even share is 33.3%)" in dead.text
    assert "expert 1 has 100.0% of all tasks' weight" in collapsed.text and "lr.routers" in collapsed.text
    assert overall(uses) == pytest.approx((np.log(2) / np.log(3) / 2, 0, 3, 1))


def test_confidence_bins_hold_every_row_once():
    rows = [Asked(row % 2, value, row > 2) for row, value in enumerate([0.0, 1.0, 0.1, 0.05, 0.99, 1.0])]
    bins = confidence_bins(rows, 2)
    assert len(bins) == 20 and [low for task, low, *_ in bins if not task] == pytest.approx(np.arange(10) / 10)
    assert [(count, right) for task, _, _, count, right in bins if count] == [(1, 0), (1, 0), (1, 1), (1, 1), (2, 1)]
    assert confidence_bins([], 2) == []
    assert sum(count for *_, count, _ in confidence_bins([Asked(0, 0.5, True)] * 3, 1)) == 3


def test_a_map_of_a_plane_keeps_its_distances():
    generator = torch.Generator().manual_seed(0)
    plane, basis = torch.randn(6, 2, generator=generator), torch.linalg.qr(torch.randn(9, 2, generator=generator))[0]
    points, share = project(list(plane @ basis.T + 3))
    torch.testing.assert_close(torch.cdist(*[torch.tensor(points).float()] * 2), torch.cdist(plane, plane))
    assert share.sum() == pytest.approx(1) and share[0] >= share[1]


def test_a_map_of_one_point_or_equal_points_is_a_point():
    for vectors in ([torch.ones(3)], [torch.ones(3)] * 4):
        points, share = project(vectors)
        assert not points.any() and not share.any() and points.shape == (len(vectors), 2)
