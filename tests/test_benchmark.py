"""The benchmark: what it times is right, every variant is timed in every round, and the tool says what it found."""

import json
import time

import pytest
import torch

from moe_peft import benchmark
from moe_peft.benchmark import EAGER, OURS, AdapterBench, Variant, add_experts, interleave
from moe_peft.layers.experts import ExpertLinear
from moe_peft.layers.tensor_train import layout_of

COUNTS, WIDTH, ROWS, TOKENS, RANK = [1, 3, 40], 12, 4, 3, 2
NAMES = [EAGER, OURS, "1 expert", "3 experts", "40 experts"]
CORES = 4 * sum(a * size * b for a, size, b in layout_of(WIDTH, WIDTH).shapes(RANK))
"""Bytes of one expert's cores."""
TINY = ["--width", WIDTH, "--rows", ROWS, "--tokens", TOKENS, "--rank", RANK, "--rounds", 2]


def bench(training=False, dtype="fp32", counts=COUNTS):
    found = AdapterBench(WIDTH, ROWS, TOKENS, dtype, training)
    add_experts(found, RANK, counts)
    return found


def burn(seconds):
    """Uses the processor for so long."""
    start = time.process_time()
    while time.process_time() - start < seconds:
        pass
    return []


def test_every_round_times_every_variant_once_in_changing_orders():
    calls = []
    variants = [Variant(name, lambda name=name: calls.append(name) or []) for name in "abc"]
    seconds = interleave(variants, 20)
    assert {name: len(times) for name, times in seconds.items()} == dict.fromkeys("abc", 20)
    rounds = [tuple(calls[at : at + 3]) for at in range(3 * benchmark.WARM_UP, len(calls), 3)]
    assert len(rounds) == 20 and all(sorted(one) == ["a", "b", "c"] for one in rounds) and len(set(rounds)) > 1


def test_the_number_of_threads_is_restored():
    before = torch.get_num_threads()
    with pytest.raises(KeyError), benchmark.threads(before + 1):
        assert torch.get_num_threads() == before + 1
        raise KeyError
    assert torch.get_num_threads() == before


def test_ratios_are_those_of_the_processor_time():
    found = bench(counts=[1])
    found.variants = [
        Variant(EAGER, lambda: burn(0.002)),
        Variant(OURS, lambda: burn(0.006)),
        Variant("1 expert", lambda: time.sleep(0.01) or burn(0.002)),  # another process has the processor meanwhile
    ]
    one, two, three = found.measure(5)
    assert 2.5 < two["ratio_to"][EAGER] < 3.5 and 0.28 < one["ratio_to"][OURS] < 0.4
    assert 0.7 < three["ratio_to"][EAGER] < 1.4
    assert two["median_us"] == pytest.approx(6000, rel=0.2) and two["best_us"] <= two["median_us"]
    assert two["median_ns_per_token"] == pytest.approx(1000 * two["median_us"] / (ROWS * TOKENS))


@pytest.mark.parametrize("dtype", benchmark.DTYPES)
@pytest.mark.parametrize("training", [True, False])
def test_memory_grows_with_the_experts_and_stays_by_them(training, dtype):
    found = bench(training, dtype).bytes
    line = 2 * RANK * WIDTH * (4 if dtype == "fp32" else 2)
    tables = {name: 0 if training else line * (count + 1) for name, count in zip(NAMES[2:], COUNTS, strict=True)}
    lora = dict.fromkeys(NAMES[:2], (4 * 2 * RANK * WIDTH, 0))
    assert found == lora | {n: (CORES * c, tables[n]) for n, c in zip(NAMES[2:], COUNTS, strict=True)}


@pytest.mark.parametrize("training", [True, False])
def test_every_batch_takes_the_next_experts(training, monkeypatch):
    seen, forward = [], ExpertLinear.forward

    def spy(layer, x):
        fact = layer.context.get("task_id" if training else "line", ROWS)
        seen.append((fact if training else fact - 1).tolist())  # line 0 is the null expert
        return forward(layer, x)

    found = bench(training)
    monkeypatch.setattr(ExpertLinear, "forward", spy)
    for variant in found.variants[3:]:
        for _ in range(3):
            variant.run()
    # `add` itself has made the first call.
    assert seen[:3] == [[1, 2, 0, 1], [2, 0, 1, 2], [0, 1, 2, 0]]
    assert seen[3:] == [[4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]


def test_frozen_experts_come_out_of_the_table_and_learning_ones_do_not(monkeypatch):
    frozen, learning = bench(), bench(training=True)
    folds, fold = [], ExpertLinear.fold
    monkeypatch.setattr(ExpertLinear, "fold", lambda layer, chosen: folds.append(layer.slot) or fold(layer, chosen))
    for variant in frozen.variants:
        variant.run()
    assert not folds
    for variant in learning.variants:
        variant.run()
    assert folds == NAMES[2:]


@pytest.mark.parametrize("training", [True, False])
def test_a_variant_that_computes_something_else_is_refused(training):
    found = AdapterBench(WIDTH, ROWS, TOKENS, "fp32", training)
    weight = torch.nn.Parameter(torch.randn(WIDTH, WIDTH))
    found.add("right", lambda x: found.base()(x) + x @ weight.mT, [weight], lambda row: weight)
    with pytest.raises(RuntimeError, match="wrong differs from the plain formula by 1.0e-02 of its largest value"):
        found.add("wrong", lambda x: 1.01 * x @ weight.mT, [weight], lambda row: weight)
    assert [variant.name for variant in found.variants] == ["right"]


def test_a_variant_with_wrong_gradients_is_refused():
    found = AdapterBench(WIDTH, ROWS, TOKENS, "fp32", True)
    weight = torch.nn.Parameter(torch.randn(WIDTH, WIDTH))
    for cut in (lambda x: x @ (2 * weight - weight.detach()).mT, lambda x: (2 * x - x.detach()) @ weight.mT):
        with pytest.raises(RuntimeError, match="differs from the plain formula by 1.0e"):
            found.add("wrong", cut, [weight], lambda row: weight)


def test_an_expert_that_answers_for_another_row_is_refused(monkeypatch):
    fold = ExpertLinear.fold
    monkeypatch.setattr(ExpertLinear, "fold", lambda layer, chosen: fold(layer, chosen.flip(0)))
    with pytest.raises(RuntimeError, match="3 experts differs from the plain formula"):
        bench(counts=[3])


def test_the_tool_prints_two_tables_and_writes_all_numbers(run_tool, tmp_path):
    before = torch.get_num_threads()
    file = tmp_path / "numbers.json"
    status, out, errors = run_tool("bench", "--experts", "40,1,3,3", *TINY, "--dtype", "bf16", "--json", file)
    assert status == 0 and not errors and torch.get_num_threads() == before
    assert sum("4 rows of 3 tokens, width 12, rank 2, bf16" in line for line in out) == 2
    written = json.loads(file.read_text())
    assert written["settings"]["rounds"] == 2 and written["settings"]["dtype"] == "bf16"
    for job in ("inference", "training"):
        assert [row["variant"] for row in written[job]] == NAMES
        for row in written[job]:
            assert list(row["ratio_to"]) == NAMES and row["ratio_to"][row["variant"]] == 1
            assert 0 < row["best_us"] <= row["median_us"] and row["stored_bytes"] > 0
            assert (row["table_bytes"] > 0) == (job == "inference" and "expert" in row["variant"])
    printed = [line for line in out if line.strip().startswith("40")]
    assert len(printed) == 2 and all(f"{CORES * 40 / 1000:,.0f}" in line.split() for line in printed)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["--experts", "1,x"], "argument --experts: invalid numbers value: '1,x'"),
        (["--experts", "0,3"], "experts: [0, 3] must be one or more numbers of at least 1"),
        (["--rank", "0"], "rank: 0 is below 1"),
        (["--width", "0"], "width: 0 is below 1"),
        (["--rows", "-1"], "rows: -1 is below 1"),
        (["--tokens", "0"], "tokens: 0 is below 1"),
        (["--rounds", "0"], "rounds: 0 is below 1"),
        (["--threads", "0"], "threads: 0 is below 1"),
        (["--dtype", "fp8"], "argument --dtype: invalid choice: 'fp8' (choose from"),
        (["--nope"], "unrecognized arguments: --nope"),
        (["--json", "nowhere/x.json"], "json: the folder of 'nowhere/x.json' does not exist; make it first"),
    ],
)
def test_a_mistake_is_one_readable_line(run_tool, given, expected):
    status, out, errors = run_tool("bench", *TINY, *given)
    assert status == 2 and not out and len(errors) == 1 and errors[0].startswith(f"error: {expected}")


def test_another_dtype_is_refused():
    with pytest.raises(ValueError, match="dtype: 'fp8' is unknown; use fp32, bf16"):
        AdapterBench(WIDTH, ROWS, TOKENS, "fp8", False)
