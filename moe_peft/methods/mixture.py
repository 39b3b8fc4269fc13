"""What mixtures of LoRA experts in single linears share: a method of this kind says how it routes, in one file.

y = W0 x + (α / r) B C(x) A x,   C(x) laid out from the weights of E experts (`layers.mixtures`)
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from moe_peft.batch import Batch
from moe_peft.layers.adapted import AdaptedLinear
from moe_peft.layers.allocation import at_least
from moe_peft.layers.factors import DenseFactors
from moe_peft.layers.mixtures import Layout, MixtureRouter
from moe_peft.methods.base import MultitaskModule
from moe_peft.methods.mixture_losses import Trace, load_balance, traces, z_loss
from moe_peft.methods.task_ids import check_task_ids


class Mixture(MultitaskModule):
    """Base of mixtures of LoRA experts, with numbers that may differ by layer.

    Args:
        experts: E; a list gives layers their own from the first to the last ([2, 4, 6, 8]: a quarter of them each).
        rank: r of every expert, or a list likewise.
        alpha: α; the update is scaled by α / r; or a list likewise.
        dropout: on the adapters' input, not on the router's.
        common: the arguments of `MultitaskModule`.
    """

    scaled_by_rank: ClassVar[bool] = True
    layout: ClassVar[Layout] = "block"
    """How weights become a core, and with it which factors there are."""

    def __init__(
        self,
        experts: int | list[int] = 8,
        rank: int | list[int] = 8,
        alpha: float | list[float] = 16.0,
        dropout: float = 0.0,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        at_least("experts", experts, 1)
        at_least("rank", rank, 1)
        at_least("alpha", alpha, 0.0)
        self.experts, self.rank, self.alpha, self.dropout = experts, rank, alpha, dropout

    def adapt(self, base: nn.Linear, slot: str) -> AdaptedLinear:
        """Stacked experts, or one A for all of them, and this linear's router."""
        place = self.places[slot]
        experts, rank, alpha = place.of(self.experts), place.of(self.rank), place.of(self.alpha)
        inner = experts * rank if self.layout == "block" else rank
        factors = DenseFactors(base.in_features, base.out_features, inner, experts * rank, base.weight.device)
        router = self.router(base, experts, rank)
        scale = self.scale(experts, rank, alpha)
        return AdaptedLinear(base, factors, router, scale, self.dropout, self.context, slot)

    def scale(self, experts: int, rank: int, alpha: float) -> float:
        """Returns s, α / r where a method has no other."""
        return alpha / rank

    def router(self, base: nn.Linear, experts: int, rank: int) -> MixtureRouter:
        """Builds a linear's router."""
        raise TypeError(f"{type(self).__name__} must implement router(base, experts, rank)")


class TokenMixture(Mixture):
    """Base of mixtures whose every token is routed by its own state, with the losses that keep experts in use.

    Args:
        balance: weight of the load-balancing loss (1 at uniform use, for every router).
        z_loss: weight of the mean squared log-sum-exp of the scores (ST-MoE, arXiv 2202.08906).
        mixture: the arguments of `Mixture`.
    """

    def __init__(self, balance: float = 0.0, z_loss: float = 0.0, **mixture: Any) -> None:
        super().__init__(**mixture)
        for name, weight in (("balance", balance), ("z_loss", z_loss)):
            if weight < 0:
                raise ValueError(
                    f"{name}: {weight} is negative, which would reward what it is to prevent; give 0 or more"
                )
        self.balance, self.z_loss = balance, z_loss

    @property
    def traced(self) -> bool:
        """Whether routers leave their scores for a loss."""
        return self.balance > 0 or self.z_loss > 0

    def method_loss_terms(self, batch: Batch) -> dict[str, Tensor]:
        """The losses on the routing that were asked for."""
        found = traces(self, batch) if self.traced else {}
        return self.routing_losses(found, batch) if found else {}

    def routing_losses(self, found: Mapping[str, Trace], batch: Batch) -> dict[str, Tensor]:
        """Returns named, weighted losses on what the routers did with a training batch.

        Args:
            found: by linear, at least one.
            batch: that batch.
        """
        terms = {}
        if self.balance:
            terms["balance"] = self.balance * load_balance(found)
        if self.z_loss:
            terms["z_loss"] = self.z_loss * z_loss(found)
        return terms


class TaskMixture(Mixture):
    """Base of mixtures that route by task alone: each task's update can be merged, or exported as a LoRA."""

    task_decides: ClassVar[bool] = True

    def routed_tasks(self, batch: Batch) -> Tensor | None:
        """Returns the rows' tasks [B].

        Raises:
            ValueError: rows without a task, or a task id that there is not.
        """
        own = batch.get("task_id")
        if self.context.enabled:
            check_task_ids(own, len(self.specs), needed_by=type(self).__name__)
        return own
