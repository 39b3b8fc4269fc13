"""What a method tells those who record its routing; the routing itself comes from `RoutingContext.record`."""

from typing import ClassVar

import torch
from torch import Tensor

from moe_peft.batch import Batch
from moe_peft.methods.training import Part


class RoutingHooks(Part):
    """The part of `MultitaskModule` that a method with experts may extend."""

    task_decides: ClassVar[bool] = False
    """Whether all rows of a task are routed alike, so that an expert which no task chose is no loss."""

    @property
    def routes(self) -> bool:
        """Whether a router decides anything about the rows now."""
        return any(layer.router is not None for layer in self._module().adapted.values())

    def expert_names(self, layer: str, experts: int) -> list[str]:
        """Names the experts of a layer, in the order of the recorded weights.

        Args:
            layer: under which the routing was recorded: an adapted linear's name, or "all".
            experts: how many weights it had.
        """
        return [str(expert) for expert in range(experts)]

    def routing_gates(self) -> dict[str, tuple[float, float]]:
        """Returns, by adapted linear, the weight of the token's part in the routing and the size of the whole update.

        Where parameters are sharded, all ranks must ask.
        """
        return {}

    @torch.no_grad()
    def prompt_vectors(self, batch: Batch) -> Tensor | None:
        """Returns what the routing reads of each row's prompt [B, d], if it does; tasks are mapped by their means."""
        prior = self._module().prior
        return prior.embedder(batch) if prior is not None and prior.fitted else None

    def landmarks(self) -> list[tuple[str, str, Tensor]]:
        """Returns what else is on that map: name, kind ("task" or "cluster") and vector [d]; all ranks must ask."""
        prior = self._module().prior
        if prior is None or not prior.fitted:
            return []
        return [(str(cluster), "cluster", vector) for cluster, vector in enumerate(prior.centroids)]
