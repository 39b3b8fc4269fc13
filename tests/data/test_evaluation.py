import pytest

from moe_peft.data.encoding import EncodedRow
from moe_peft.data.evaluation import group_for_evaluation


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


def test_options_that_lie_side_by_side_all_count_for_a_rows_length():
    """Sorted by anything else, a batch holds rows of unlike length, and padding costs a quarter of it."""
    rows = [encoded(0, "many", 2, 6), encoded(0, "few", 4, 2), encoded(0, "one", 5, 1)]
    for packed, expected in ((True, ["many", "few", "one"]), (False, ["one", "few", "many"])):
        batches = group_for_evaluation(rows, 6, packed=packed)
        assert [row.row_id for batch in batches for row in batch] == [f"t0/{name}" for name in expected]


@pytest.mark.parametrize("world_size", [1, 2])
def test_tasks_take_turns_so_that_the_first_batches_hold_all_of_them(world_size):
    for rank in range(world_size):
        tasks = [batch[0].task_id for batch in group_for_evaluation(ROWS, 4, world_size, rank)]
        assert tasks[:4] == [0, 1, 0, 1]


@pytest.mark.parametrize("world_size", [2, 4])
def test_a_rank_without_a_row_of_its_own_takes_the_first_ranks(world_size):
    rows = [encoded(0, str(i), 3, 4) for i in range(3)]
    shards = [group_for_evaluation(rows, 4, world_size, rank) for rank in range(world_size)]
    assert len({len(shard) for shard in shards}) == 1 and all(batch for shard in shards for batch in shard)
    own = [row.row_id for shard in shards for batch in shard for row in batch]
    assert set(own) == {row.row_id for row in rows}
    assert shards[-1][-1] == shards[0][-1]


def test_a_row_with_more_options_than_the_budget_is_never_torn_apart():
    batches = group_for_evaluation([encoded(0, "x", 3, 9), encoded(0, "y", 2, 9)], 4)
    assert [[row.row_id for row in batch] for batch in batches] == [["t0/x"], ["t0/y"]]
