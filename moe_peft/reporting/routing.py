"""What the recorded routing says, as arrays: shares of weight by task, layer and expert, and layers laid out as a grid.

Shapes: T tasks, L layers, E experts, K kinds of linears, B blocks of the backbone.
"""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from moe_peft.reporting.records import Use, of_best_split

ALL = "all"
"""Instead of a layer's name: one choice serves all layers, or a mean over them."""


class Shares(NamedTuple):
    """How the routing weight of each task was shared among the experts, in one split at one step."""

    split: str
    step: int
    tasks: list[str]
    layers: list[str]
    experts: list[str]
    values: np.ndarray
    """[T, L, E]; a row sums to one, or is nan where nothing was recorded."""
    counted: tuple[int, int]
    """The fewest and the most tokens of a task; rows, where one choice serves all layers."""

    @property
    def source(self) -> str:
        """What the numbers were counted on."""
        few, many = self.counted
        unit = "rows" if self.layers == [ALL] else "tokens"
        count = f"{few:,}" if few == many else f"{few:,} to {many:,}"
        return f"{self.split} rows at step {self.step:,}, {count} {unit} of each task"

    @property
    def by_task(self) -> np.ndarray:
        """[T, E] mean over layers."""
        return mean_of_known(self.values, axis=1)


def shares(records: Sequence[Use]) -> Shares | None:
    """Returns the shares of the best split that was recorded (test, validation, train); None for no records."""
    used = of_best_split(list(records))
    if not used:
        return None
    tasks, layers, experts = (
        list(dict.fromkeys(getattr(record, name) for record in used)) for name in ("task", "layer", "expert")
    )
    place = [{name: at for at, name in enumerate(names)} for names in (tasks, layers, experts)]
    weights = np.zeros((len(tasks), len(layers), len(experts)))
    for record in used:
        weights[place[0][record.task], place[1][record.layer], place[2][record.expert]] += record.weight
    total = weights.sum(-1, keepdims=True)
    values = np.divide(weights, total, out=np.full_like(weights, np.nan), where=total > 0)
    tokens = [int(record.tokens) for record in used]
    return Shares(used[0].split, used[0].step, tasks, layers, experts, values, (min(tokens), max(tokens)))


def mean_of_known(values: np.ndarray, axis: int) -> np.ndarray:
    """Mean of what is not nan; nan where all is."""
    known = ~np.isnan(values)
    count = known.sum(axis)
    total = np.where(known, values, 0).sum(axis)
    return np.divide(total, count, out=np.full(count.shape, np.nan), where=count > 0)


class Grid(NamedTuple):
    """Where layers lie: kinds of linears (q_proj, …) by blocks of the backbone."""

    kinds: list[str]
    blocks: list[int]
    place: dict[str, tuple[int, int]]

    def spread(self, values: Mapping[str, float]) -> np.ndarray:
        """[K, B] values of layers; nan where there is no such layer."""
        table = np.full((len(self.kinds), len(self.blocks)), np.nan)
        for layer, value in values.items():
            table[self.place[layer]] = value
        return table


def grid(layers: Sequence[str]) -> Grid:
    """Lays layers out by the first number in their names; kinds keep the order in which they come."""
    parts = {layer: re.fullmatch(r"(.*?)\.?\b(\d+)\.(.+)", layer) for layer in layers}
    stacks = {found[1] for found in parts.values() if found}

    def kind_of(layer: str) -> str:
        found = parts[layer]
        if found is None:
            return layer
        return found[3] if len(stacks) == 1 else f"{found[1].partition('.')[0]}.{found[3]}"

    block_of = {layer: int(found[2]) if found else 0 for layer, found in parts.items()}
    whole = list(dict.fromkeys(kind_of(layer) for layer in layers))
    last = [kind.rpartition(".")[2] for kind in whole]
    kinds = last if len(set(last)) == len(last) else whole
    blocks = sorted(set(block_of.values()))
    place = {layer: (whole.index(kind_of(layer)), blocks.index(block_of[layer])) for layer in layers}
    return Grid(kinds, blocks, place)
