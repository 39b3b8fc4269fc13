"""Numbers that differ from layer to layer: experts, ranks, scales (MoLA, arXiv 2402.08562; HiLo, arXiv 2502.03884).

A list of G numbers gives layer l of L the number at floor(l * G / L): [2, 4, 6, 8] over 32 layers is eight layers of
each. Layers are those with an adapted linear; an encoder and a decoder count theirs apart.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple, TypeVar

N = TypeVar("N", int, float)
NUMBER = re.compile(r"(?:^|.*?\.)(?P<at>\d+)\.")


class Place(NamedTuple):
    """Where a linear lies: in layer `layer` of `layers`."""

    layer: int = 0
    layers: int = 1

    def of(self, value: N | list[N]) -> N:
        """Returns the number that a layer at this depth has.

        Args:
            value: one for all, or a list from the first layers to the last.
        """
        return value[self.layer * len(value) // self.layers] if isinstance(value, list) else value


def places(names: Iterable[str]) -> dict[str, Place]:
    """Returns where linears lie, by the first number in their names; one without a number is in a stack of its own."""
    found = {name: NUMBER.match(name) for name in names}
    stacks: dict[str, set[int]] = {}
    for match in found.values():
        if match:
            stacks.setdefault(match.string[: match.start("at")], set()).add(int(match["at"]))
    order = {stack: sorted(numbers) for stack, numbers in stacks.items()}
    return {
        name: Place(order[own].index(int(match["at"])), len(order[own]))
        if match and (own := name[: match.start("at")]) in order
        else Place()
        for name, match in found.items()
    }


def in_proportion(alpha: float | list[float], old: int | list[int], new: int | list[int]) -> float | list[float]:
    """Returns the α that has to a new rank the ratio that α has to the old one.

    Raises:
        ValueError: lists of different lengths.
    """
    if not isinstance(old, list) and not isinstance(alpha, list):
        return alpha * new / old  # type: ignore[operator]  # the new one is of the old one's kind
    length = max(len(own) for own in (alpha, old) if isinstance(own, list))
    alphas, olds, news = (own if isinstance(own, list) else [own] * length for own in (alpha, old, new))
    if not len(alphas) == len(olds) == len(news):
        raise ValueError(
            f"alpha: {alpha} has not as many numbers as rank: {old}; give both one for each part of the layers"
        )
    return [own * to / at for own, at, to in zip(alphas, olds, news, strict=True)]


def at_least(argument: str, value: N | list[N], least: N) -> None:
    """Refuses a number that is too small, or an empty list.

    Raises:
        ValueError: names the argument and the value.
    """
    values = value if isinstance(value, list) else [value]
    if not values or min(values) < least:
        raise ValueError(
            f"{argument}: {value} must be at least {least}, or a list of such numbers from first layer to last"
        )
