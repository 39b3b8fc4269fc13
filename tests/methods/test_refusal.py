"""Which rows a mixture refuses, in numbers that can be counted by hand."""

import pytest
import torch

from moe_peft.layers.closed_form_router import PrototypeRouter, RidgeRouter
from moe_peft.layers.expert_router import LinearRouter
from moe_peft.methods.refusal import NO_LIMIT, auroc, refusals, summary, threshold


@pytest.mark.parametrize(
    "keep, expected", [(1.0, 1), (0.999, 1), (0.95, 6), (0.55, 46), (0.5, 51), (0.01, 100), (1e-9, 100), (0.0, 100)]
)
def test_a_threshold_leaves_the_share_that_is_to_stay(keep, expected):
    """Of 1..100 in any order, the last keep * 100 numbers stay."""
    shuffled = torch.randperm(100, generator=torch.Generator().manual_seed(0)).float() + 1
    assert threshold(shuffled, keep) == expected
    assert (shuffled >= expected).float().mean() >= keep


def test_equal_confidences_stay_together():
    assert threshold(torch.tensor([2.0, 1.0, 1.0, 3.0, 1.0]), 0.6) == 1.0


def test_auroc_is_the_share_of_pairs_in_the_right_order_however_large_the_numbers():
    """Sigmoids of these are all 1 in fp64."""
    inside, outside = [60.0, 50.0, 45.0, 40.0], [55.0, 45.0, 39.0]
    wins = sum(1.0 if a > b else 0.5 if a == b else 0.0 for a in inside for b in outside)
    assert wins == 7.5
    assert auroc(torch.tensor(inside), torch.tensor(outside)) == pytest.approx(wins / 12, abs=1e-6)
    assert auroc(torch.tensor(outside), torch.tensor(inside)) == pytest.approx(1 - wins / 12, abs=1e-6)


def test_the_report_counts_rows_below_the_threshold_and_compares_every_task_with_the_mixture():
    inside = torch.tensor([1.0, 5.0, 6.0, 7.0])
    outside = {"near": torch.tensor([5.5, 6.5]), "far": torch.tensor([0.0, 0.5, 4.0])}
    mixture, near, far, both = (tuple(line) for line in refusals(inside, outside, 4.5))
    assert mixture == ("mixture", "all", 4, 5.0, 0.25, None)
    assert near == ("outside", "near", 2, 5.5, 0.0, pytest.approx(3 / 8))
    assert far == ("outside", "far", 3, 0.5, 1.0, pytest.approx(11 / 12))
    assert both == ("outside", "all", 5, 4.0, pytest.approx(0.6), pytest.approx(14 / 20))


def test_without_rows_from_elsewhere_the_report_is_about_the_mixture():
    table = refusals(torch.tensor([1.0, 5.0]), {}, NO_LIMIT)
    assert [tuple(line) for line in table] == [("mixture", "all", 2, 1.0, 0.0, None)]
    assert summary(table) == "null expert: 100.0% of the mixture's 2 test rows stay"


@pytest.mark.parametrize("router", [LinearRouter, PrototypeRouter, RidgeRouter])
def test_confidence_is_how_far_the_best_score_stands_above_the_mean_of_the_experts_there_are(router):
    scores = torch.tensor([[3.0, 1.0, -1.0], [3.0, 1.0, float("-inf")], [-7.0, -9.0, -8.0]])
    assert router().confidence(scores).tolist() == [2.0, 1.0, 1.0]
