"""The benchmark of one linear: what it times is right, every variant is timed in every round, its figures are true."""

import csv
import io
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.nn.functional import linear

from moe_peft.benchmark import figures, output, suite, targets, timing
from moe_peft.benchmark.adapters import AdapterBench
from moe_peft.benchmark.figures import Product
from moe_peft.benchmark.setting import DTYPES, Setting
from moe_peft.benchmark.timing import Ratio, Variant, interleave
from moe_peft.benchmark.variants import Subject
from moe_peft.context import RoutingContext

FIGURES = Path(__file__).with_name("benchmark_figures.csv")
TINY = Setting(width=32, rows=4, tokens=3, dtype="fp32", training=True)


def burn(seconds):
    """Uses the processor for so long."""
    start = time.process_time()
    while time.process_time() - start < seconds:
        pass
    return []


def plain_linear(setting, forward=linear, name="one"):
    """A subject of one weight, x Wᵀ, whose forward is given."""
    weight = torch.nn.Parameter(torch.randn(setting.width, setting.width, generator=torch.Generator().manual_seed(0)))
    product = Product("W x", setting.count, setting.width, setting.width, 2)
    return Subject(
        name,
        setting.linear(),
        lambda x: forward(x, weight),
        lambda x: x @ weight.double().mT,
        {"weight": weight},
        [product],
    )


def test_every_round_times_every_variant_once_in_changing_orders():
    calls = []
    variants = [Variant(name, lambda name=name: calls.append(name)) for name in "abc"]
    seconds = interleave(variants, 20, warm_up=2)
    assert {name: len(times) for name, times in seconds.items()} == dict.fromkeys("abc", 20)
    rounds = [tuple(calls[at : at + 3]) for at in range(3 * 2, len(calls), 3)]
    assert len(rounds) == 20 and all(sorted(one) == ["a", "b", "c"] for one in rounds) and len(set(rounds)) > 1


def test_the_number_of_threads_is_restored():
    before = torch.get_num_threads()
    with pytest.raises(KeyError), timing.threads(before + 1):
        assert torch.get_num_threads() == before + 1
        raise KeyError
    assert torch.get_num_threads() == before


def test_times_are_those_of_this_process():
    variants = [Variant("two", lambda: burn(0.002)), Variant("six", lambda: burn(0.006))]
    variants.append(Variant("asleep", lambda: time.sleep(0.01) or burn(0.002)))
    found = timing.summary(interleave(variants, 5))
    assert 2.5 < found["six"]["ratio_to"]["two"].median < 3.5
    assert 0.7 < found["asleep"]["ratio_to"]["two"].median < 1.4
    assert found["six"]["median_us"] == pytest.approx(6000, rel=0.2) and found["six"]["min_us"] >= 6000


def test_a_ratio_is_taken_within_rounds():
    # A machine half as fast in every second round changes no ratio; medians of times would give 1.5 by 4.
    assert timing.ratio([3, 6, 3, 6, 3], [2, 4, 2, 4, 2]) == Ratio(1.5, 1.5, 1.5)
    assert timing.ratio([1, 2, 3, 4, 5], [1, 1, 1, 1, 1]) == Ratio(3, 2, 4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("base", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_every_variant_computes_its_plain_formula(dtype, base, training):
    setting = TINY._replace(dtype=dtype, base=base, training=training)
    builds = [*suite.references(), *suite.ours(), *suite.others(), *(suite.merged() if base and not training else ())]
    bench = AdapterBench(setting, builds)
    names = [subject.name for subject in bench.subjects]
    assert {*suite.OURS, suite.EAGER_22, suite.TREX_LOOP} <= set(names) and len(set(names)) == len(builds)


@pytest.mark.parametrize(
    ("forward", "found"),
    [
        (lambda x, weight: 1.01 * linear(x, weight), "y differs"),
        (lambda x, weight: linear(x, 2 * weight - weight.detach()), "the gradient of weight differs"),
        (lambda x, weight: linear(2 * x - x.detach(), weight), "the gradient of x differs"),
    ],
)
def test_a_variant_that_computes_something_else_is_refused(forward, found):
    AdapterBench(TINY, [plain_linear])
    with pytest.raises(RuntimeError, match=f"one: {found} from the plain formula by"):
        AdapterBench(TINY, [partial(plain_linear, forward=forward)])


def test_a_gradient_of_zero_is_refused():
    def dead(setting):
        one, unused = plain_linear(setting), torch.nn.Parameter(torch.ones(1))
        return one._replace(
            forward=lambda x: one.forward(x) + 0 * unused,
            plain=lambda x: one.plain(x) + 0 * unused.double(),
            trained={"unused": unused},
        )

    with pytest.raises(RuntimeError, match="one: the gradient of unused is zero"):
        AdapterBench(TINY, [dead])


@pytest.mark.parametrize("at", [1, 2, 3, 5, 6], ids=lambda at: suite.OURS[at])
def test_facts_of_another_row_are_refused(at, monkeypatch):
    put = RoutingContext.put
    monkeypatch.setattr(RoutingContext, "put", lambda self, name, fact, key: put(self, name, fact.flip(0), key))
    with pytest.raises(RuntimeError, match="differs from the plain formula"):
        AdapterBench(TINY, [suite.ours()[at]])


def test_figures_are_those_of_a_graph_counted_by_hand():
    x, weight = torch.randn(5, 8, requires_grad=True), torch.randn(3, 8, requires_grad=True)
    table, products = torch.zeros(4), [Product("W x", 5, 8, 3, 2), Product("h h", 3, 5, 3, 2)]

    def forward(x):
        h = linear(x, weight).relu()  # t (a view), mm, relu
        return torch.zeros(3, 3).addmm_(h.view(5, 3).mT, h).view(9)  # zeros, addmm_; h is kept once, views are free

    found = figures.take_figures(forward, x, {"weight": weight}, [table], torch.ones(9), products)
    assert (found.operations_forward, found.parameters) == (4, 24)
    assert found.flops_forward == found.formula_forward == 2 * 5 * 8 * 3 + 2 * 3 * 5 * 3
    assert found.flops_backward == found.formula_backward == 2 * found.flops_forward
    assert (found.kept_bytes, found.kept_input_bytes, found.kept_weight_bytes) == (4 * 15, 4 * 40, 4 * 24)
    assert (found.largest, found.peak_bytes) == (40, 0)  # the gradient of x


def test_a_product_of_all_experts_is_seen():
    wide = Setting(width=32, rows=4, tokens=3, dtype="fp32", training=True)

    def naive(setting):
        subject = suite.ours()[1](setting)
        return subject._replace(forward=lambda x: subject.forward(x) + 0 * x.new_zeros(12 * 32 * 32).sum())

    [row] = AdapterBench(wide, [naive]).measure(rounds=0)
    eager = AdapterBench(wide, suite.references()).measure(rounds=0)
    assert [rule.met for rule in targets.rules([row, *eager])][2] is False
    assert "T-REX" in targets.rules([row, *eager])[2].worst


@pytest.fixture(scope="module")
def stable():
    return suite.stable_figures()


def test_figures_are_the_committed_ones(stable, tmp_path):
    """Where a change is meant: python tools/bench.py --figures tests/benchmark_figures.csv."""
    output.write_figures(tmp_path / "found.csv", stable)
    found, committed = (
        {(row["job"], row["dtype"], row["variant"]): row for row in csv.DictReader(io.StringIO(path.read_text()))}
        for path in (tmp_path / "found.csv", FIGURES)
    )
    assert len(found) == 2 * 2 * (3 + len(suite.OURS)) and found == committed


def test_flops_are_the_closed_formula_and_no_tensor_holds_all_experts_outputs(stable):
    formula, _, tensor = targets.rules(stable)
    assert formula.met and tensor.met, (formula, tensor)


def test_targets_are_held_against_their_own_job_only():
    def row(variant, ratio, job="forward + backward, alone", against=suite.EAGER_8):
        return {"variant": variant, "job": job, "width": 9, "dtype": "fp32", "ratio_to": {against: Ratio(ratio, 1, 2)}}

    rows = [row(suite.MORE, 1.034), row(suite.MORE, 9.0, "forward, alone"), row(suite.MOR1E, 1.006)]
    rows.append(row(suite.LORA, 0.5, against="nobody"))
    found = {one.row: one for one in targets.verdicts(rows)}
    assert list(found) == ["MoR1E E=8 / eager LoRA r=8", "MoRE r=8 / eager LoRA r=8"]
    more, mor1e = found["MoRE r=8 / eager LoRA r=8"], found["MoR1E E=8 / eager LoRA r=8"]
    assert more.met and more[2:6] == (1.034, 1, 2, 1.03) and more.setting == "forward + backward, alone, d=9, fp32"
    assert not mor1e.met
