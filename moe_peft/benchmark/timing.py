"""Times of one interleaved run: every round calls every variant once, and ratios are taken within rounds.

A machine's speed drifts, so that only two times of one round may be divided by each other. On a CPU the time is that of
this process, on a GPU that between two events of the stream.
"""

import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

WARM_UP = 3
Clock = Callable[[Callable[[], Any]], float]
"""Calls something and returns the seconds that it took."""


class Variant(NamedTuple):
    """One thing to time."""

    name: str
    run: Callable[[], Any]


class Ratio(NamedTuple):
    """How two variants' times compare over the rounds: median and quartiles."""

    median: float
    low: float
    high: float


def process_clock(run: Callable[[], Any]) -> float:
    """Returns the CPU seconds of this process."""
    start = time.process_time()
    run()
    return max(time.process_time() - start, 1e-9)


def cuda_clock(run: Callable[[], Any]) -> float:
    """Returns the seconds between two events of the stream, with nothing else on the device."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return max(start.elapsed_time(end) / 1000, 1e-9)


def clock_of(device: str) -> Clock:
    """Returns the clock that tells what a device has done."""
    return cuda_clock if torch.device(device).type == "cuda" else process_clock


def interleave(
    variants: Sequence[Variant], rounds: int, clock: Clock = process_clock, warm_up: int = WARM_UP
) -> dict[str, list[float]]:
    """Returns the seconds of every call: each round calls every variant once, in an order of its own.

    Args:
        variants: what to call.
        rounds: timed calls of each.
        clock: what tells their time.
        warm_up: calls of each before the first round.
    """
    order = random.Random(0)
    for variant in [variant for variant in variants for _ in range(warm_up)]:
        variant.run()
    seconds: dict[str, list[float]] = {variant.name: [] for variant in variants}
    for _ in range(rounds):
        for variant in order.sample(list(variants), len(variants)):
            seconds[variant.name].append(clock(variant.run))
    return seconds


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> Ratio:
    """Compares two variants round by round."""
    each = [one / two for one, two in zip(ours, theirs, strict=True)]
    if len(each) == 1:
        return Ratio(each[0], each[0], each[0])
    low, middle, high = statistics.quantiles(each, n=4, method="inclusive")
    return Ratio(middle, low, high)


def summary(seconds: Mapping[str, Sequence[float]]) -> dict[str, dict[str, Any]]:
    """Returns for each variant its shortest and median time in µs, and its ratio to every variant."""
    return {
        name: {
            "min_us": 1e6 * min(own),
            "median_us": 1e6 * statistics.median(own),
            "ratio_to": {other: ratio(own, theirs) for other, theirs in seconds.items()},
        }
        for name, own in seconds.items()
    }


@contextmanager
def threads(number: int) -> Iterator[None]:
    """Within: torch computes with so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
