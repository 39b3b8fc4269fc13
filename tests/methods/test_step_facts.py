"""Facts of a step, counted anew in the test."""

from collections import Counter

import pytest
import torch

from moe_peft.methods.step_facts import StepFacts
from tests.tiny_progress import Observer, observed, task_means
from tests.tiny_runs import world  # noqa: F401  (a fixture)


@pytest.mark.parametrize(("kind", "accumulation"), [("causal", 4), ("seq2seq", 1), ("classifier", 1)])
def test_facts_are_what_a_recount_finds(world, tmp_path, kind, accumulation):  # noqa: F811
    tasks = ("tone", "mood", "stars") if kind == "classifier" else ("tone", "next", "count")
    config = observed(world.config(tasks, kind))
    config["trainer"] |= {"max_epochs": 1, "accumulate_grad_batches": accumulation}
    module = world.fit(tmp_path / "run", config).model
    seen = Observer.last.seen
    assert len(seen) == 9 * accumulation
    for one in seen:
        rows = Counter(one.tasks)
        assert one.facts.batches == 1 and one.facts.tokens == one.tokens
        assert one.facts.rows == tuple(rows[task] for task in tasks)
        assert one.facts.loss == pytest.approx(accumulation * one.loss, rel=1e-6)  # of which Lightning takes its share
        assert one.facts.task_means(module.specs) == pytest.approx(task_means([one]), rel=1e-5)
        mean = sum(one.losses) / len(one.losses)
        assert one.facts.loss == pytest.approx(mean, rel=1e-5)
    assert len({one.facts.loss for one in seen}) == len(seen)


def test_facts_of_several_batches_are_sums():
    one = StepFacts(1, 2.0, 30, (1, 0, 2), (0.5, 0.0, 3.0))
    other = StepFacts(2, 5.0, 12, (0, 0, 4), (0.0, 0.0, 9.0))
    assert one.plus(other) == StepFacts(3, 7.0, 42, (1, 0, 6), (0.5, 0.0, 12.0))


def test_the_mean_over_ranks_is_read_as_their_sum():
    ranks = 3
    packed = torch.tensor([[2.0, 31, 1, 0, 0.5, 0.0], [3.0, 30, 2, 1, 4.0, 7.0], [4.0, 33, 0, 1, 0.0, 5.0]])
    facts = StepFacts.of(packed.mean(0).tolist(), ranks)
    assert facts[:4] == (1, 3.0, 94, (3, 2))
    assert facts.losses == pytest.approx((4.5, 12.0), rel=1e-6)
