import pytest

from moe_peft.data.encoding import EncodedRow
from moe_peft.data.loader import MultitaskSampler, group_for_evaluation
from moe_peft.data.sampling import Proportional, Uniform

SIZES = [40, 25]
TOKENS = [1 + row % 12 for row in range(65)]


def sampler(rule=None, **place):
    return MultitaskSampler(rule or Proportional(), ["a", "b"], SIZES, TOKENS, 16, seed=3, **place)


@pytest.mark.parametrize("accumulation", [1, 2, 4, 16])
def test_accumulation_slices_make_up_the_same_global_batches(accumulation):
    whole = [micro.rows for micro in sampler()]
    parts = [micro.rows for micro in sampler(accumulation=accumulation)]
    joined = [sum(parts[at : at + accumulation], []) for at in range(0, len(parts), accumulation)]
    assert joined == whole


@pytest.mark.parametrize("accumulation", [1, 2])
def test_rank_slices_make_up_the_same_global_batches(accumulation):
    whole = [micro.rows for micro in sampler()]
    ranks = [list(sampler(world_size=2, rank=rank, accumulation=accumulation)) for rank in range(2)]
    parts = [one.rows + other.rows for one, other in zip(*ranks, strict=True)]
    joined = [sum(parts[at : at + accumulation], []) for at in range(0, len(parts), accumulation)]
    assert joined == whole


@pytest.mark.parametrize(("world_size", "accumulation"), [(1, 1), (1, 4), (2, 1), (2, 4)])
def test_shares_are_those_of_the_global_batch(world_size, accumulation):
    whole = list(sampler())
    parts = world_size * accumulation
    for rank in range(world_size):
        for index, micro in enumerate(sampler(world_size=world_size, rank=rank, accumulation=accumulation)):
            rows = whole[index // accumulation].rows
            assert micro.rows_share == 16 / parts
            assert micro.tokens_share == sum(TOKENS[row] for row in rows) / parts


def test_length_counts_micro_batches():
    assert len(sampler()) == 5 and len(sampler(accumulation=4)) == 20
    assert len(list(sampler(accumulation=4))) == 20


def test_epoch_two_draws_another_order_and_epoch_one_comes_back():
    one = sampler()
    first = [micro.rows for micro in one]
    one.set_epoch(1)
    assert [micro.rows for micro in one] != first
    one.set_epoch(0)
    assert [micro.rows for micro in one] == first


def test_steps_per_epoch_overrides_the_data():
    assert len(sampler(Uniform(), accumulation=2)) == 10
    short = MultitaskSampler(Uniform(), ["a", "b"], SIZES, TOKENS, 16, steps_per_epoch=3)
    assert len(list(short)) == 3


@pytest.mark.parametrize(
    ("size", "place", "use"),
    [
        (16, {"world_size": 3}, "use 15 or 18"),
        (2, {"accumulation": 4}, "use 4"),
        (10, {"world_size": 2, "accumulation": 4}, "use 8 or 16"),
    ],
)
def test_batch_size_that_does_not_divide_names_the_numbers_and_the_fix(size, place, use):
    with pytest.raises(ValueError) as error:
        MultitaskSampler(Proportional(), ["a", "b"], SIZES, TOKENS, size, **place)
    message = str(error.value)
    assert f"batch_size={size}" in message and use in message
    assert (
        f"{place.get('world_size', 1)} ranks" in message and f"{place.get('accumulation', 1)} accumulation" in message
    )


def encoded(task_id, name, length, options):
    return EncodedRow(f"t{task_id}/{name}", task_id, {}, "", [1] * length, [], [[1]] * options, None, 0)


ROWS = [encoded(0, str(i), 3 + i * 7 % 11, 4) for i in range(21)] + [encoded(1, str(i), 5 + i, 0) for i in range(9)]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_has_every_row_once_over_all_ranks(world_size):
    shards = [group_for_evaluation(ROWS, 16, world_size, rank) for rank in range(world_size)]
    names = [row.row_id for shard in shards for batch in shard for row in batch]
    assert sorted(names) == sorted(row.row_id for row in ROWS)
    assert len({len(shard) for shard in shards}) == 1


def test_evaluation_batches_hold_one_task_within_the_budget():
    for batch in group_for_evaluation(ROWS, 16):
        assert len({row.task_id for row in batch}) == 1
        assert sum(len(row.options) or 1 for row in batch) <= 16


def test_evaluation_is_longest_first_within_a_task():
    lengths = [len(row.prompt) for batch in group_for_evaluation(ROWS, 16) for row in batch if row.task_id == 0]
    assert lengths == sorted(lengths, reverse=True)


def test_a_row_with_more_options_than_the_budget_is_never_torn_apart():
    batches = group_for_evaluation([encoded(0, "x", 3, 9), encoded(0, "y", 2, 9)], 4)
    assert [[row.row_id for row in batch] for batch in batches] == [["t0/x"], ["t0/y"]]
