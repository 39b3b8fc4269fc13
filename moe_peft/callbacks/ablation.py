"""What a trained routing is worth: test the same checkpoint with a part of it spoilt."""

from collections.abc import Callable
from typing import Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from moe_peft.layers.rank_selector import rank_selectors
from moe_peft.layers.routers import JointRouter
from moe_peft.methods.base import MultitaskModule
from moe_peft.sharding import is_sharded

What = Literal["uniform_router", "shuffled_prior", "shuffled_ranks", "full_ranks"]


class RoutingAblation(Callback):
    """Spoils the routing of a loaded checkpoint before a test; the checkpoint file stays as it is.

    Give the test a run folder of its own, so that its results do not take the place of the honest ones.

    Args:
        what: T-REX: "uniform_router" sets every router's scores to zero (all pairs alike), "shuffled_prior" hands every
            cluster's similarity to another cluster's pair. MoRE: "shuffled_ranks" hands every task's ranks to another
            task, "full_ranks" gives every task the largest rank everywhere.
        seed: of the shuffle.
    """

    def __init__(self, what: What, seed: int = 0) -> None:
        self.what, self.seed = what, seed

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuses to spoil a training run.

        Raises:
            ValueError: used with `fit`.
        """
        if stage == "fit":
            raise ValueError(f"RoutingAblation({self.what!r}) is for `test`: remove it from trainer.callbacks of a fit")

    @torch.no_grad()
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Spoils the routing, after the checkpoint was loaded.

        Raises:
            ValueError: the method has no such routing.
        """
        assert isinstance(pl_module, MultitaskModule)
        if is_sharded(pl_module):
            raise ValueError(f"RoutingAblation({self.what!r}) changes whole routers; test on one device, or with ddp")
        spoil: dict[str, Callable[[MultitaskModule], bool]] = {
            "uniform_router": self._uniform_router,
            "shuffled_prior": self._shuffled_prior,
            "shuffled_ranks": self._ranks,
            "full_ranks": self._ranks,
        }
        if not spoil[self.what](pl_module):
            raise ValueError(f"RoutingAblation: {type(pl_module).__name__} has nothing to make a {self.what}")

    def _others(self, count: int) -> torch.Tensor:
        """For each of `count` places another one: along a random cycle, so that every place changes."""
        if count < 2:
            raise ValueError(f"RoutingAblation: a {self.what} needs two or more to shuffle, here is {count}")
        order = torch.randperm(count, generator=torch.Generator().manual_seed(self.seed))
        return torch.empty_like(order).index_copy(0, order, order.roll(1))

    def _uniform_router(self, module: MultitaskModule) -> bool:
        routers = [layer.router for layer in module.adapted.values() if isinstance(layer.router, JointRouter)]
        for router in routers:
            router.weight.zero_()
        return bool(routers)

    def _shuffled_prior(self, module: MultitaskModule) -> bool:
        if module.prior is None:
            return False
        module.prior.centroids.copy_(module.prior.centroids[self._others(module.prior.clusters)])
        return True

    def _ranks(self, module: MultitaskModule) -> bool:
        selectors = rank_selectors(module.adapted)
        for selector in selectors.values():
            chosen = selector.probabilities().argmax(-1)
            if self.what == "full_ranks":
                selector.fix(torch.full_like(chosen, len(selector.experts) - 1))
            else:
                selector.fix(chosen[self._others(len(chosen))])
        return bool(selectors)
