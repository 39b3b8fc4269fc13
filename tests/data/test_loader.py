import pytest

from moe_peft.data.loader import MultitaskSampler, ResumableLoader
from moe_peft.data.sampling import EqualRows, Proportional, Uniform

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


@pytest.mark.parametrize(("world_size", "accumulation"), [(1, 1), (1, 4), (2, 1), (2, 4)])
@pytest.mark.parametrize("rule", [Proportional(), EqualRows()], ids=["unequal", "equal"])
def test_task_shares_are_those_of_the_global_batch(rule, world_size, accumulation):
    whole = list(sampler(rule))
    for rank in range(world_size):
        for index, micro in enumerate(sampler(rule, world_size=world_size, rank=rank, accumulation=accumulation)):
            of_b = sum(row >= 40 for row in whole[index // accumulation].rows)
            expected = [(of_b if row >= 40 else 16 - of_b) / (world_size * accumulation) for row in micro.rows]
            assert micro.task_share == expected
            assert isinstance(rule, Proportional) or set(expected) == {8 / (world_size * accumulation)}


def test_task_shares_hold_where_a_task_has_no_rows():
    empty = MultitaskSampler(Proportional(), ["a", "none", "b"], [40, 0, 25], TOKENS, 16, seed=3)
    assert [micro.task_share for micro in empty] == [micro.task_share for micro in sampler()]


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


def loader(seed=3, batch_size=16, rule=None, **place):
    rule = rule or Proportional()
    sampler = MultitaskSampler(rule, ["a", "b"], SIZES, TOKENS, batch_size, seed=seed, **place)
    return ResumableLoader([], sampler, 0, 0)


def stopped(**arguments):
    """The state of a loader after 6 of its epoch's 10 micro-batches."""
    first = loader(accumulation=2, **arguments)
    first.handed_out = 6
    return first.state_dict()


def test_more_ranks_resume_the_same_global_batches():
    ranks = [loader(accumulation=2, world_size=4, rank=rank) for rank in range(4)]
    for rank in ranks:
        rank.load_state_dict(stopped())
    steps = zip(*(rank.multitask_sampler for rank in ranks), strict=True)
    parts = [sum((micro.rows for micro in step), []) for step in steps]
    assert [one + two for one, two in zip(parts[::2], parts[1::2], strict=True)] == [m.rows for m in sampler()][3:]


@pytest.mark.parametrize(
    ("changes", "telling"),
    [
        ({"accumulation": 4}, "accumulate_grad_batches=4 .*accumulate_grad_batches=2"),
        ({"batch_size": 32}, "batch_size=32 .*batch_size=16"),
        ({"seed": 4}, "seed=4 .*seed=3"),
        ({"rule": Uniform()}, "epoch 0 has other rows"),
        ({"steps_per_epoch": 9}, "epoch 0 has other rows"),
        ({"accumulation": 1, "world_size": 2}, "accumulate_grad_batches=1"),
    ],
)
def test_resuming_into_other_rows_is_refused_in_one_line(changes, telling):
    with pytest.raises(ValueError, match=telling) as error:
        loader(**{"accumulation": 2, **changes}).load_state_dict(stopped())
    assert "\n" not in str(error.value)
