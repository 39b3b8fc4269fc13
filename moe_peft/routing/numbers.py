"""What the sums of a routing say: use of experts by task, entropy, mutual information, experts that are of no use.

Shapes: T tasks, E experts, n vectors of width d.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from moe_peft.predictions import NOBODY

DEAD = 0.01
"""Of an even share 1 / E: an expert with less that is nobody's largest could be taken out, and no token would notice.

A token gives such an expert on average less than a hundredth of what an even router would, and none relies on it."""
COLLAPSED = 0.95
"""Of all weight: an expert with more leaves the others together a twentieth, so that the layer is a plain adapter."""
BINS = 10
ROUNDING = 1e-9
"""Of the largest axis: what is less is no direction."""


class LayerUse(NamedTuple):
    """The routing of one layer; tasks of which no token was seen are nan in the tables."""

    experts: list[str]
    weight: np.ndarray
    """[T, E] mean weight over a task's tokens; a row sums to one."""
    chosen: np.ndarray
    """[T, E] share of a task's tokens for which the expert has the largest weight."""
    tokens: np.ndarray
    """[T] of every task; rows, where whole rows are routed."""
    share: np.ndarray
    """[E] weight, each task counting alike."""
    entropy: float
    """Mean over tokens, 0 (one expert) to 1 (all alike)."""
    mutual_information: float
    """Between task and expert, 0 (all tasks are routed alike) to 1 (the expert tells the task)."""
    dead: list[int]
    collapsed: int | None
    """The expert that takes it all."""


def measure(sums: np.ndarray, experts: Sequence[str], task_decides: bool = False) -> LayerUse:
    """Returns the numbers of a layer.

    Args:
        sums: [T, 2E + 1] of `RoutingSums`.
        experts: their names. A null expert is never dead: it waits for rows that do not belong.
        task_decides: all rows of a task are routed alike: an expert that no task chose is not dead, and one task alone
            does not make a collapse.
    """
    count = len(experts)
    tokens = sums[:, count:-1].sum(1)
    seen = tokens > 0
    mean = np.divide(sums[:, :-1], tokens[:, None], out=np.full((len(sums), 2 * count), np.nan), where=seen[:, None])
    weight, chosen = mean[:, :count], mean[:, count:]
    share = weight[seen].mean(0)
    unused = (share < DEAD / count) & (chosen[seen].max(0) == 0)
    dead = [] if task_decides else [at for at in np.flatnonzero(unused).tolist() if experts[at] != NOBODY]
    choice = count > 1 and (seen.sum() > 1 or not task_decides)
    collapsed = int(share.argmax()) if choice and share.max() > COLLAPSED else None
    entropy, information = float(sums[:, -1].sum() / tokens.sum()), _information(weight[seen])
    return LayerUse(list(experts), weight, chosen, tokens.astype(int), share, entropy, information, dead, collapsed)


def _information(weight: np.ndarray) -> float:
    """Mutual information of task (all alike) and expert, as a share of the most there can be."""
    most = math.log(max(1, min(weight.shape)))
    nats = _entropy(weight.mean(0)) - _entropy(weight).mean()
    return max(0.0, float(nats) / most) if most else 0.0


def _entropy(p: np.ndarray) -> np.ndarray:
    return -(p * np.log(np.where(p > 0, p, 1.0))).sum(-1)


class Overall(NamedTuple):
    """The layers' numbers in one: means, and sums of what is counted."""

    entropy: float
    mutual_information: float
    dead: int
    collapsed: int


def overall(uses: Mapping[str, LayerUse]) -> Overall:
    """Returns what is said of all layers together."""
    layers = uses.values()
    return Overall(
        sum(use.entropy for use in layers) / len(uses),
        sum(use.mutual_information for use in layers) / len(uses),
        sum(len(use.dead) for use in layers),
        sum(use.collapsed is not None for use in layers),
    )


class Finding(NamedTuple):
    """A fault of the routing."""

    kind: str
    """"dead" or "collapsed"."""
    layer: str
    expert: str
    share: float
    """Of all weight of the layer, each task counting alike."""
    text: str


def findings(uses: Mapping[str, LayerUse], task_decides: bool = False) -> list[Finding]:
    """Returns the dead experts and the collapsed layers, each with a sentence that says what to do.

    Args:
        uses: the layers.
        task_decides: see `measure`.
    """
    found = []
    useless = "the others are of no use; lower lr.routers, or leave the layer out of targets"
    if task_decides:
        useless = "no task is told from another; raise lr.routers, or use LoRA"
    for layer, use in uses.items():
        for at in use.dead if use.collapsed is None else ():  # else all the others would be named
            share, even = float(use.share[at]), 1 / len(use.experts)
            text = (
                f"Expert {use.experts[at]} of {layer} is dead: it has {share:.2%} of the weight (an even share is "
                f"{even:.1%}) and is no token's first choice; use fewer experts, or lower lr.routers."
            )
            found.append(Finding("dead", layer, use.experts[at], share, text))
        if use.collapsed is not None:
            expert, share = use.experts[use.collapsed], float(use.share[use.collapsed])
            text = (
                f"The routing of {layer} has collapsed: expert {expert} has {share:.1%} of all tasks' weight, so that "
                f"{useless}."
            )
            found.append(Finding("collapsed", layer, expert, share, text))
    return found


class Asked(NamedTuple):
    """A row of which a router for whole rows said how sure it was."""

    task: int
    confidence: float
    right: bool
    """Whether the row reached its own task's expert."""


def confidence_bins(rows: Sequence[Asked], tasks: int) -> list[tuple[int, float, float, int, int]]:
    """Returns (task, low, high, rows, right) of ten equal bins, from the lowest confidence to the highest."""
    if not rows:
        return []
    values = np.array([row.confidence for row in rows])
    edges = np.histogram_bin_edges(values, BINS)
    place = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, BINS - 1)
    counts = np.zeros((tasks, BINS, 2), dtype=int)
    for row, at in zip(rows, place.tolist(), strict=True):
        counts[row.task, at] += 1, row.right
    return [
        (task, float(edges[at]), float(edges[at + 1]), int(counts[task, at, 0]), int(counts[task, at, 1]))
        for task in range(tasks)
        for at in range(BINS)
    ]


def project(vectors: Sequence[Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the first two principal components [n, 2] of n vectors [d], and each one's share of the variance [2].

    An axis points to where its largest value is.
    """
    table = torch.stack([vector.double().cpu() for vector in vectors]).numpy()
    left, sizes, _ = np.linalg.svd(table - table.mean(0), full_matrices=False)
    sizes[sizes < ROUNDING * sizes[0]] = 0.0
    found, share = np.zeros((len(table), 2)), np.zeros(2)
    axes = min(2, len(sizes))
    found[:, :axes] = left[:, :axes] * sizes[:axes]
    if sizes.any():
        share[:axes] = (sizes**2 / (sizes**2).sum())[:axes]
    extreme = found[np.abs(found).argmax(0), [0, 1]]
    return found * np.where(extreme < 0, -1.0, 1.0), share
