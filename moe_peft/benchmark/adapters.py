"""One linear, everything that adapts it: checked against the plain formula, then counted, then timed in turns."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moe_peft.benchmark.figures import Figures, Product, formula_text, take_figures
from moe_peft.benchmark.setting import ReadyLinear, Setting
from moe_peft.benchmark.timing import Variant, clock_of, interleave, summary
from moe_peft.benchmark.variants import Subject

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
"""Largest accepted difference from the plain formula, relative to its largest value."""


Build = Callable[[Setting], Subject]


class AdapterBench:
    """One batch of one linear, and the variants that adapt it.

    Args:
        setting: sizes, dtype, and what is timed.
        builds: makes the variants, each on a base of its own; all bases have the same weights.

    Raises:
        ValueError: a setting that cannot be measured.
        RuntimeError: a variant that does not compute what its plain formula says.
    """

    def __init__(self, setting: Setting, builds: Sequence[Build]) -> None:
        setting.check()
        self.setting = setting
        self.x = setting.input().requires_grad_(setting.training)
        self.upstream = setting.input(seed=1)
        self.weight = setting.linear().weight
        self.subjects: list[Subject] = []
        for build in builds:
            subject = build(setting)
            self.check(subject)
            self.subjects.append(subject)

    def run(self, subject: Subject) -> list[Tensor]:
        """Calls a variant: its output, and the gradients of x and of what it trains."""
        with torch.set_grad_enabled(self.setting.training):
            y = subject.forward(self.x)
            if not self.setting.training:
                return [y]
            return [y, *torch.autograd.grad(y, [self.x, *subject.trained.values()], self.upstream)]

    def check(self, subject: Subject) -> None:
        """Compares a variant's output and gradients with the plain formula, in fp64.

        The upstream gradient leans towards the output: a gate's gradient, which sums over all tokens, would else be
        what rounding leaves of terms that cancel.

        Raises:
            RuntimeError: they differ, or one of them is zero, which would equal anything.
        """
        with torch.set_grad_enabled(self.setting.training):
            found = [subject.forward(self.x)]
            x = self.x.detach().double().requires_grad_(self.setting.training)
            expected = [subject.plain(x)]  # of the same batch
            if self.setting.base:
                expected = [expected[0] + x @ self.weight.double().mT]
        if self.setting.training:
            y, weights = expected[0], list(subject.trained.values())
            upstream = (self.upstream + y.detach() / y.detach().std()).to(self.x.dtype)
            found += torch.autograd.grad(found[0], [self.x, *weights], upstream)
            expected += torch.autograd.grad(y, [x, *weights], upstream.double())
        names = ["y", "the gradient of x", *(f"the gradient of {name}" for name in subject.trained)]
        for name, one, other in zip(names, found, expected, strict=False):
            _refuse(f"{subject.name}: {name}", one, other, TOLERANCE[self.x.dtype])
        if isinstance(subject.base, ReadyLinear):
            subject.base.ready.zero_()  # adapters write into it

    def formula(self, subject: Subject) -> list[Product]:
        """Returns the closed formula of a variant, the base's own product included where it is part of it."""
        width = self.setting.width
        base = [Product("W0 x", self.setting.count, width, width, 1)] if self.setting.base else []
        return base + subject.products

    def figures(self, subject: Subject) -> Figures:
        """Counts a variant's work."""
        upstream = self.upstream if self.setting.training else None
        stored = [subject.base.weight, *subject.stored]
        return take_figures(subject.forward, self.x, subject.trained, stored, upstream, self.formula(subject))

    def measure(self, rounds: int) -> list[dict[str, Any]]:
        """Returns for each variant what it is, its figures and, with any rounds, its times in turns with the others."""
        setting = {name: value for name, value in self.setting._asdict().items() if name not in ("training", "base")}
        rows = [
            {
                "job": self.setting.job,
                **setting,
                "variant": subject.name,
                "experts": subject.experts,
                **self.figures(subject)._asdict(),
                "formula": formula_text(self.formula(subject)),
            }
            for subject in self.subjects
        ]
        if not rounds:
            return rows
        variants = [Variant(subject.name, partial(self.run, subject)) for subject in self.subjects]
        times = summary(interleave(variants, rounds, clock_of(self.setting.device)))
        for row in rows:
            own = times[row["variant"]]
            row |= own | {"ns_per_token": 1000 * own["median_us"] / self.setting.count}
        return rows


def _refuse(name: str, found: Tensor, expected: Tensor, tolerance: float) -> None:
    largest = expected.abs().max()
    if largest == 0:
        raise RuntimeError(f"{name} is zero, which equals anything")
    difference = (found - expected).abs().max() / largest
    if not difference < tolerance:
        raise RuntimeError(f"{name} differs from the plain formula by {difference:.1e} of its largest value")
