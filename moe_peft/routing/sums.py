"""Sums of routing weights by layer, task and expert: all that the numbers of a routing are made of.

Shapes: B rows, S tokens of a row, T tasks, E experts.
"""

import math

import torch
from torch import Tensor, distributed
from torch.nn.functional import one_hot


class RoutingSums:
    """What the tokens of many batches were routed to; rows instead of tokens, where a whole row is routed.

    A token's weights are brought to the sum one first. Weights of either sign count by their size; a token without any
    weight was not routed and counts nothing.

    Args:
        tasks: T.
    """

    def __init__(self, tasks: int) -> None:
        self.tasks = tasks
        self.layers: dict[str, Tensor] = {}
        """[T, 2E + 1] fp64 by layer: each expert's weight, the tokens of which it had the largest, and entropies, whose
        unit is that of a uniform choice."""

    @torch.no_grad()
    def add(self, layer: str, weights: Tensor, task_ids: Tensor, real: Tensor) -> None:
        """Adds what a layer decided for a batch.

        Args:
            layer: its name.
            weights: [B or 1, S or 1, E], or without one of the first two dimensions, or with a multiple of the rows:
                beam search repeats every row k times, next to each other.
            task_ids: [B]; rows of a negative one do not count.
            real: [B, S] bool, False for tokens that do not count; of another S than the weights, rows count as a whole.

        Raises:
            ValueError: weights of a number of rows that does not fit the batch.
        """
        weights, task_ids, real = _aligned(layer, weights.double().abs(), task_ids, real)
        total, experts = weights.sum(-1, keepdim=True), weights.shape[-1]
        counted = (real & (task_ids >= 0).unsqueeze(1)).unsqueeze(-1) & (total > 0)
        p = torch.where(counted, weights / total, 0.0)
        entropy = torch.special.entr(p).sum(-1, keepdim=True) / math.log(max(experts, 2))
        chosen = one_hot(p.argmax(-1), experts) * counted
        rows = torch.cat([p, chosen, entropy], -1).sum(1)
        own = one_hot(task_ids.clamp(min=0), self.tasks).to(rows)
        self._plus(layer, own.T @ rows)

    def update(self, other: "RoutingSums") -> None:
        """Adds what another one holds."""
        for layer, table in other.layers.items():
            self._plus(layer, table)

    def join(self) -> None:
        """Adds up what all ranks hold, of the same layers, on the CPU; all must call."""
        if not self.layers:
            return
        joined = torch.cat([table.flatten() for table in self.layers.values()])
        if distributed.is_available() and distributed.is_initialized():
            distributed.all_reduce(joined)
        parts = joined.cpu().split([table.numel() for table in self.layers.values()])
        for (layer, table), part in zip(self.layers.items(), parts, strict=True):
            self.layers[layer] = part.view(table.shape)

    def _plus(self, layer: str, table: Tensor) -> None:
        self.layers[layer] = self.layers[layer] + table if layer in self.layers else table


def _aligned(layer: str, weights: Tensor, task_ids: Tensor, real: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Brings weights to [B', S', E], task ids to [B'] and the mask to [B', S']."""
    batch = len(task_ids)
    if weights.dim() == 2:
        weights = weights.view(*real.shape, -1) if len(weights) == real.numel() else weights.unsqueeze(1)
    if len(weights) == 1:
        weights = weights.expand(batch, -1, -1)
    if len(weights) % batch:
        raise ValueError(f"{layer} recorded a routing of {len(weights)} rows for a batch of {batch}: give one per row")
    task_ids, real = (part.repeat_interleave(len(weights) // batch, 0) for part in (task_ids, real))
    if weights.shape[1] != real.shape[1]:
        real = real.any(1, keepdim=True).expand(-1, weights.shape[1])
    return weights, task_ids, real
