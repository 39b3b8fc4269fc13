"""DESIGN's speed targets, held against what was measured."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from moe_peft.benchmark.suite import (
    BARE,
    EAGER_5,
    EAGER_8,
    EAGER_22,
    LORA,
    MERGED_MORE,
    MERGED_TT,
    MOR1E,
    MORE,
    OURS,
    PEFT,
    TREX,
    TT_17,
    TT_1000,
    TT_LORA,
)

EXTRA_OPERATIONS = 12
"""Operations, forward and backward, that a method may dispatch beyond eager LoRA's."""

SAME = 1.02
"""1.00, for two that do the same one operation: within what a machine lets one see."""

DIRECTIONS = ("forward", "backward")


class Target(NamedTuple):
    """One time over another."""

    ours: str
    against: str
    most: float | None
    """Largest accepted ratio; None for a ratio without a target."""
    training: bool = True
    base: bool = False


TARGETS = (
    Target(TREX, EAGER_22, 1.25),
    Target(MOR1E, EAGER_8, 1.00),
    Target(MORE, EAGER_8, 1.03),
    Target(TT_LORA, EAGER_5, 1.05),
    Target(TT_17, EAGER_5, 1.10),
    Target(TT_1000, TT_17, 1.25),
    Target(LORA, EAGER_8, None),
    Target(LORA, PEFT, None),
    Target(MERGED_MORE, BARE, SAME, training=False, base=True),
    Target(MERGED_TT, BARE, SAME, training=False, base=True),
)


class Verdict(NamedTuple):
    """One line of the table of targets."""

    row: str
    setting: str
    ratio: float
    low: float
    high: float
    target: float | None
    met: bool | None
    """At the two digits that are printed."""


def verdicts(rows: Sequence[dict[str, Any]]) -> list[Verdict]:
    """Holds timed rows of `adapter_section` against the targets, where both variants were timed."""
    found = []
    for target in TARGETS:
        job = f"{'forward + backward' if target.training else 'forward'}, {'with the base' if target.base else 'alone'}"
        for row in rows:
            ratio = row["ratio_to"].get(target.against) if row["job"] == job and row["variant"] == target.ours else None
            if ratio is None:
                continue
            met = None if target.most is None else round(ratio.median, 2) <= target.most
            where = f"{job}, d={row['width']}, {row['dtype']}"
            found.append(
                Verdict(
                    f"{target.ours} / {target.against}", where, ratio.median, ratio.low, ratio.high, target.most, met
                )
            )
    return found


class Rule(NamedTuple):
    """A rule on figures, and the variants that break it."""

    rule: str
    worst: str
    met: bool


def rules(rows: Sequence[dict[str, Any]]) -> list[Rule]:
    """Holds our variants' figures against DESIGN's rules for them."""
    mine = [row for row in rows if row["variant"] in OURS]
    eager = {(row["job"], row["dtype"], row["width"]): operations(row) for row in rows if row["variant"] == EAGER_8}
    extra = {
        f"{row['variant']} ({row['job']}, {row['dtype']})": operations(row)
        - eager[row["job"], row["dtype"], row["width"]]
        for row in mine
    }
    flops = [row["variant"] for row in mine if any(row[f"flops_{d}"] != row[f"formula_{d}"] for d in DIRECTIONS)]
    large = [row["variant"] for row in mine if row["experts"] > 1 and row["largest"] >= outputs_of_all_experts(row)]
    most = max(extra, key=extra.__getitem__)
    return [
        Rule("FLOPs equal the closed formula", ", ".join(sorted(set(flops))) or "none differs", not flops),
        Rule(
            f"operations at most eager LoRA's + {EXTRA_OPERATIONS}",
            f"+{extra[most]}: {most}",
            extra[most] <= EXTRA_OPERATIONS,
        ),
        Rule("no tensor [tokens, experts, O]", ", ".join(sorted(set(large))) or "none", not large),
    ]


def operations(row: dict[str, Any]) -> int:
    """Returns the operations of a row, forward and backward."""
    return row["operations_forward"] + row["operations_backward"]


def outputs_of_all_experts(row: dict[str, Any]) -> int:
    """Returns the numbers in [tokens, experts, O]."""
    return row["rows"] * row["tokens"] * row["experts"] * row["width"]
