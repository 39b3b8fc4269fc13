"""What adapters cost beside their frozen linears: CPU time of this process, every variant in every round.

The base's output is the same work in every method, so here it is there already and each variant adds its update:
times are the adapter's own. Before anything is timed, every variant must give what the plain formula gives, row by
row. Only ratios within one run mean something: each is the median, over rounds, of two times taken in one round.

Shapes: B rows, S tokens, D features in and out, R rank, E experts.
"""

import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle
from typing import Any, NamedTuple

import torch
from rich import box
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import linear

from moe_peft.context import RoutingContext
from moe_peft.layers.adapted import AdaptedLinear
from moe_peft.layers.expert_cache import ExpertCache
from moe_peft.layers.experts import ExpertLinear
from moe_peft.layers.factors import DenseFactors, TensorTrainFactors
from moe_peft.layers.tensor_train import layout_of, reconstruct

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
"""Largest accepted difference from the plain formula, relative to its largest value."""
EAGER, OURS = "LoRA, eager", "LoRA"
WARM_UP = 3


class Variant(NamedTuple):
    """One thing to time."""

    name: str
    run: Callable[[], list[Tensor]]


def interleave(variants: Sequence[Variant], rounds: int) -> dict[str, list[float]]:
    """Returns the CPU seconds of every call: each round calls every variant once, in an order of its own."""
    order = random.Random(0)
    for variant in [variant for variant in variants for _ in range(WARM_UP)]:
        variant.run()
    seconds: dict[str, list[float]] = {variant.name: [] for variant in variants}
    for _ in range(rounds):
        for variant in order.sample(list(variants), len(variants)):
            start = time.process_time()
            variant.run()
            seconds[variant.name].append(max(time.process_time() - start, 1e-9))
    return seconds


@contextmanager
def threads(number: int) -> Iterator[None]:
    """Within: torch computes with so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class ReadyLinear(nn.Linear):
    """A frozen linear whose output, zero at first, is there already."""

    def __init__(self, width: int, like: Tensor) -> None:
        super().__init__(width, width, bias=False, dtype=like.dtype)
        self.ready = torch.zeros_like(like, requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:
        """Returns the output; as a new tensor on the same memory, since adapters write into it."""
        return self.ready.detach()


class AdapterBench:
    """One batch of one linear, and the variants that adapt it.

    Args:
        width: D.
        rows: B.
        tokens: S.
        dtype: "fp32" or "bf16", of the base; adapters are stored in fp32.
        training: time forward and backward instead of forward alone.

    Raises:
        ValueError: a size below 1, or another dtype.
    """

    def __init__(self, width: int, rows: int, tokens: int, dtype: str, training: bool) -> None:
        for name, value in (("width", width), ("rows", rows), ("tokens", tokens)):
            if value < 1:
                raise ValueError(f"{name}: {value} is below 1")
        if dtype not in DTYPES:
            raise ValueError(f"dtype: {dtype!r} is unknown; use {', '.join(DTYPES)}")
        torch.manual_seed(0)
        self.width, self.rows, self.tokens, self.training = width, rows, tokens, training
        self.x = torch.randn(rows, tokens, width).to(DTYPES[dtype]).requires_grad_(training)
        self.upstream = torch.randn_like(self.x, requires_grad=False)
        self.context = RoutingContext()
        ids = torch.arange(rows).view(-1, 1)
        self.key = self.context.begin(ids, torch.ones_like(ids))
        self.variants: list[Variant] = []
        self.bytes: dict[str, tuple[int, int]] = {}

    def base(self) -> ReadyLinear:
        """Returns a linear to adapt."""
        return ReadyLinear(self.width, self.x)

    def add(
        self,
        name: str,
        forward: Callable[[Tensor], Tensor],
        weights: Sequence[Tensor],
        update: Callable[[int], Tensor],
        tables: Sequence[Tensor] = (),
    ) -> None:
        """Adds a variant, whose base is `base()`.

        Args:
            name: unique.
            forward: x -> [B, S, D].
            weights: what it stores and trains.
            update: the plain formula: a row's ΔW [D, D] for the first call of `forward`, made of the weights.
            tables: what else it keeps in memory.

        Raises:
            RuntimeError: it does not give what the plain formula gives.
        """

        def run() -> list[Tensor]:
            with torch.set_grad_enabled(self.training):
                y = forward(self.x)
                return [y, *torch.autograd.grad(y, [self.x, *weights], self.upstream)] if self.training else [y]

        for found, expected in zip(run(), self._plain(weights, update), strict=False):
            difference = (found.float() - expected).abs().max() / expected.abs().max()
            if not difference < TOLERANCE[self.x.dtype]:
                raise RuntimeError(f"{name} differs from the plain formula by {difference:.1e} of its largest value")
        self.variants.append(Variant(name, run))
        self.bytes[name] = sum(part.nbytes for part in weights), sum(part.nbytes for part in tables)

    def _plain(self, weights: Sequence[Tensor], update: Callable[[int], Tensor]) -> list[Tensor]:
        """Returns ΔW_b x_b and its gradients for x and the weights, row by row in fp32."""
        outputs, inputs, totals = [], [], [torch.zeros_like(weight) for weight in weights]
        for row in range(self.rows):
            x = self.x[row].detach().float().requires_grad_()
            y = x @ update(row).mT
            own, *gradients = torch.autograd.grad(y, [x, *weights], self.upstream[row].float())
            outputs.append(y.detach())
            inputs.append(own)
            for total, gradient in zip(totals, gradients, strict=True):
                total += gradient
        return [torch.stack(outputs), torch.stack(inputs), *totals]

    def measure(self, rounds: int) -> list[dict[str, Any]]:
        """Returns for each variant its name, bytes, times, and `ratio_to` every other one."""
        seconds, result = interleave(self.variants, rounds), []
        for name, own in seconds.items():
            ratios = {
                other: statistics.median(one / two for one, two in zip(own, theirs, strict=True))
                for other, theirs in seconds.items()
            }
            stored, tables = self.bytes[name]
            numbers = {"stored_bytes": stored, "table_bytes": tables, "best_us": 1e6 * min(own)}
            numbers["median_us"] = 1e6 * statistics.median(own)
            numbers["median_ns_per_token"] = 1000 * numbers["median_us"] / (self.rows * self.tokens)
            result.append({"variant": name, **numbers, "ratio_to": ratios})
        return result


def add_experts(bench: AdapterBench, rank: int, counts: Sequence[int]) -> None:
    """Adds TT-LoRA MoE with these numbers of experts, and LoRA of the same rank, plain and through this package.

    The rows of a batch go to different experts, as far as there are, and every batch to the next ones. Frozen experts
    come out of the table of folded ones. All banks begin with the same experts; both LoRAs are the first one.

    Raises:
        ValueError: a rank or a number of experts below 1.
    """
    if not counts or min(counts) < 1:
        raise ValueError(f"experts: {list(counts)} must be one or more numbers of at least 1")
    layout, scale = layout_of(bench.width, bench.width), bench.width**-0.5
    bank = TensorTrainFactors(layout, rank, experts=max(counts))
    for core in bank.cores:
        nn.init.normal_(core, std=core.shape[1] ** -0.5)
    a, b = (nn.Parameter(part[0].detach().contiguous()) for part in bank(torch.zeros(1, dtype=torch.int64)))
    _add_lora(bench, a, b, scale)
    for count in sorted(set(counts)):
        factors = TensorTrainFactors(layout, rank, experts=count)
        factors.load_state_dict({name: core[:count] for name, core in bank.state_dict().items()})
        _add_bank(bench, factors, scale)


def _add_lora(bench: AdapterBench, a: nn.Parameter, b: nn.Parameter, scale: float) -> None:
    base, dtype = bench.base(), bench.x.dtype
    used = (a, b) if bench.training else (a.detach().to(dtype), b.detach().to(dtype))

    def eager(x: Tensor) -> Tensor:
        return base(x) + scale * linear(linear(x, used[0].to(dtype)), used[1].to(dtype))

    factors = DenseFactors(bench.width, bench.width, len(a), len(a))
    factors.A, factors.B = a, b
    layer = AdaptedLinear(bench.base(), factors, None, scale, 0.0, bench.context, OURS).train(bench.training)
    for name, forward in ((EAGER, eager), (OURS, layer)):
        bench.add(name, forward, (a, b), lambda row: scale * b @ a)


def _add_bank(bench: AdapterBench, factors: TensorTrainFactors, scale: float) -> None:
    count, cores = factors.experts or 0, list(factors.cores)
    name = f"{count:,} expert{'s' * (count > 1)}"
    layer = ExpertLinear(bench.base(), factors, scale, 0.0, bench.context, name).train(bench.training)
    every = torch.arange(math.lcm(bench.rows, count)).view(-1, bench.rows) % count
    fact, batches = "task_id", every
    if not bench.training:
        with torch.no_grad():
            lines = ExpertCache([layer], limit=2**62).lines(torch.arange(count))
        assert lines is not None
        fact, batches = "line", lines[every]
    turn = cycle(batches.unbind())

    def forward(x: Tensor) -> Tensor:
        bench.context.put(fact, next(turn), bench.key)
        return layer(x)

    def update(row: int) -> Tensor:
        return scale * reconstruct([core[every[0, row]] for core in cores], factors.layout)

    bench.add(name, forward, cores, update, layer.table or ())


def table(title: str, rows: list[dict[str, Any]], references: Sequence[str]) -> Table:
    """Lays out what `AdapterBench.measure` returned, with the ratios to some of the variants."""
    ratios = [f"/ {reference}".replace(", ", ",\n") for reference in references]
    result = Table("variant", title=title, title_justify="left", box=box.SIMPLE)
    for name in ("µs /\nbatch", "ns /\ntoken", *ratios, "stored\nkB", "table\nkB"):
        result.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        numbers = [f"{row[key]:,.0f}" for key in ("median_us", "median_ns_per_token")]
        numbers += [f"{row['ratio_to'][reference]:.2f}" for reference in references]
        numbers += [f"{row[key] / 1000:,.0f}" for key in ("stored_bytes", "table_bytes")]
        result.add_row(row["variant"], *numbers)
    return result
