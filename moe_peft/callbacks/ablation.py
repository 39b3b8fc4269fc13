"""What a trained router and a fitted prior are worth: test the same checkpoint with one of them spoilt."""

from typing import Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from moe_peft.layers.routers import JointRouter
from moe_peft.methods.base import MultitaskModule


class RoutingAblation(Callback):
    """Spoils the routing of a loaded checkpoint before a test; the checkpoint file stays as it is.

    Give the test a run folder of its own, so that its results do not take the place of the honest ones.

    Args:
        what: "uniform_router" sets every router's scores to zero (all pairs alike); "shuffled_prior" hands every
            cluster's similarity to another cluster's pair.
        seed: of the shuffle.
    """

    def __init__(self, what: Literal["uniform_router", "shuffled_prior"], seed: int = 0) -> None:
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
            ValueError: the method has no such router or prior.
        """
        assert isinstance(pl_module, MultitaskModule)
        routers = [layer.router for layer in pl_module.adapted.values() if isinstance(layer.router, JointRouter)]
        prior = pl_module.prior
        if self.what == "uniform_router" and routers:
            for router in routers:
                router.weight.zero_()
        elif self.what == "shuffled_prior" and prior is not None:
            generator = torch.Generator().manual_seed(self.seed)
            order = torch.randperm(prior.clusters, generator=generator)
            # Handing on along a random cycle moves every cluster.
            prior.centroids[order] = prior.centroids[order.roll(1)].clone()
        else:
            raise ValueError(f"RoutingAblation: {type(pl_module).__name__} has nothing to make a {self.what}")
