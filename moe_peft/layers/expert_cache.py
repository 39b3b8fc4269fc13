"""Folded experts, kept for all layers at once under a byte limit: the most recently used stay.

Folding an expert costs about as much as adapting a few tokens, but every batch and every decoding step would do it
again. A table of N lines per layer holds folded experts; line 0 is the null expert, whose update is exactly zero.
Which lines a batch needs is decided once, for all layers; nothing loops over experts. Shapes: B rows, E experts.
"""

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from moe_peft.layers.experts import ExpertLinear

NULL = -1
"""The expert of a row that none fits: the bare base."""


class ExpertCache:
    """Tables of folded experts for all layers of a model.

    Cores that were changed in place, replaced or moved are seen, a write through `core.data` is not: `clear` then.

    Args:
        layers: the layers; they share one choice of experts.
        limit: bytes that all tables may take.
    """

    def __init__(self, layers: Sequence[ExpertLinear], limit: int) -> None:
        self.layers, self.limit = list(layers), limit
        self._lines: OrderedDict[int, int] = OrderedDict()
        self._cores: list[Tensor] = []
        self._state: list[tuple] = []

    def capacity(self) -> int:
        """Returns how many experts fit, besides the null expert."""
        each = sum(
            layer.factors.rank_in * (layer.in_features + layer.out_features) * layer.weight.element_size()
            for layer in self.layers
        )
        experts = self.layers[0].factors.experts or 0
        return max(0, min(experts, self.limit // each - 1))

    def lines(self, chosen: Tensor) -> Tensor | None:
        """Returns the lines [B] of the chosen experts [B], folding those that are not there.

        Returns None where they do not all fit, where cores are sharded (FSDP2 gathers them inside the model's forward
        only), and where they learn: all is forgotten then, since fused optimizers do not count their changes. The
        layers then fold for themselves, one at a time.
        """
        cores = [core for layer in self.layers for core in layer.factors.cores]
        if (torch.is_grad_enabled() and cores[0].requires_grad) or isinstance(cores[0], DTensor):
            self.clear()
            return None
        self._forget_if_changed(cores)
        wanted, room = set(chosen.tolist()) - {NULL}, self.capacity()
        if not room or len(wanted) > room:
            return None
        self._make_tables(room + 1)
        for expert in wanted & self._lines.keys():
            self._lines.move_to_end(expert)
        missing = sorted(wanted - self._lines.keys())
        if missing:
            free = sorted(set(range(1, room + 1)) - set(self._lines.values()))[: len(missing)]
            while len(free) < len(missing):
                free.append(self._lines.popitem(last=False)[1])
            self._fold(torch.tensor(missing), torch.tensor(free))
            self._lines.update(zip(missing, free, strict=True))
        return torch.tensor([self._lines.get(expert, 0) for expert in chosen.tolist()], device=chosen.device)

    def clear(self) -> None:
        """Forgets all experts and gives the memory back."""
        self._lines.clear()
        for layer in self.layers:
            layer.table = None

    def _forget_if_changed(self, cores: list[Tensor]) -> None:
        """Drops all lines as soon as a core, or a base's dtype or device, is another one than when they were made."""
        state: list[tuple] = [(core._version, core.data_ptr()) for core in cores]
        state += [(layer.weight.dtype, layer.weight.device) for layer in self.layers]
        if state != self._state:
            self.clear()
            self._state, self._cores = state, cores  # kept, so that no other core can get a dropped one's address

    @torch.inference_mode(False)  # a table made in inference mode could not be written outside of it
    def _make_tables(self, lines: int) -> None:
        for layer in self.layers:
            if layer.table is None:
                rank, zeros = layer.factors.rank_in, layer.weight.new_zeros
                layer.table = zeros(lines, rank, layer.in_features), zeros(lines, rank, layer.out_features)

    def _fold(self, experts: Tensor, lines: Tensor) -> None:
        for layer in self.layers:
            assert layer.table is not None
            device = layer.weight.device
            a, b = layer.fold(experts.to(device))
            for table, folded in zip(layer.table, (a, b.mT), strict=True):
                table.index_copy_(0, lines.to(device), folded.to(table.dtype))
