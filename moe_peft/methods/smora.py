"""SMoRA (arXiv 2501.15103): every rank of a LoRA is an expert, and a token uses k of them.

    y = W0 x + (α / (k r)) Σ_e g_e B_e A_e x,   u = σ(W x) + b
    g_e = k u_e / Σ_{i of the k largest u} u_i where e is among those k, 0 elsewhere

No loss balances the experts: after every optimizer step b_e moves by `bias_step` towards more use where e was chosen
less often than the mean, and the other way round. As in the official code b enters the weight too, not only the choice.
`rank` is 1 for single ranks; a larger one is the official `rank_partition`, there with a bias for each rank.

Differences from the official code, which moves b at every forward, on every rank and padding by itself, and once more
where it recomputes: here once a step, from the counts of all real tokens of all ranks. The router reads no dropout.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from moe_peft.batch import Batch
from moe_peft.layers.allocation import at_least
from moe_peft.layers.mixtures import Layout, TokenRouter
from moe_peft.methods.mixture import TokenMixture
from moe_peft.methods.mixture_losses import Trace, over_ranks


class BiasedRouter(TokenRouter):
    """Keeps the k experts of the largest biased sigmoid, whose weights then sum to k.

    Args:
        width: D.
        experts: E.
        layout: see `MixtureRouter`.
        rank: see `MixtureRouter`.
        top_k: k.
        device: where to create the parameters.
    """

    bias: Tensor

    def __init__(
        self, width: int, experts: int, layout: Layout, rank: int, top_k: int, device: torch.device | None = None
    ) -> None:
        super().__init__(width, experts, layout, rank, traced=True, device=device)
        self.rule, self.top_k = self._biased, top_k
        self.register_buffer("bias", torch.zeros(experts, device=device, dtype=torch.float32))

    def _biased(self, scores: Tensor) -> Tensor:
        kept = (scores.sigmoid() + self.bias).topk(self.top_k, -1)
        shares = self.top_k * kept.values / kept.values.sum(-1, keepdim=True)
        return torch.zeros_like(scores).scatter(-1, kept.indices, shares)


class SMoRA(TokenMixture):
    """Ranks as experts, kept in use by a bias.

    Args:
        top_k: k, experts of a token.
        bias_step: by how much a bias moves in an optimizer step; 0 leaves the sigmoid alone.
        mixture: the arguments of `TokenMixture`; the paper's have many `experts` of `rank` 1.
    """

    sized_by: ClassVar[str] = "experts"
    as_lora = {"experts": 1, "top_k": 1}

    def __init__(self, top_k: int = 8, bias_step: float = 1e-5, **mixture: Any) -> None:
        super().__init__(**mixture)
        at_least("top_k", top_k, 1)
        fewest = min(self.experts) if isinstance(self.experts, list) else self.experts
        if top_k > fewest:
            raise ValueError(f"top_k: {top_k} is more than the {fewest} experts of a layer; choose fewer")
        if bias_step < 0:
            raise ValueError(f"bias_step: {bias_step} is negative, which would favour the busiest; give 0 or more")
        self.top_k, self.bias_step = top_k, bias_step
        self._loads: dict[str, Tensor] = {}
        """[E] int64 by linear: this rank's tokens since the last optimizer step, by the experts that they chose."""

    @property
    def traced(self) -> bool:
        """Routers always leave their scores: the biases live on counts."""
        return True

    def scale(self, experts: int, rank: int, alpha: float) -> float:
        """α over the ranks that a token uses, whose weights sum to their number."""
        return alpha / (self.top_k * rank)

    def router(self, base: nn.Linear, experts: int, rank: int) -> BiasedRouter:
        """A linear map of x, the k largest of its biased sigmoid kept."""
        return BiasedRouter(base.in_features, experts, self.layout, rank, self.top_k, base.weight.device)

    def routing_losses(self, found: Mapping[str, Trace], batch: Batch) -> dict[str, Tensor]:
        """Counts the choices of a micro-batch."""
        for slot, trace in found.items():
            load = (trace.chosen * trace.real.unsqueeze(-1)).sum((0, 1)).to(torch.int64)
            self._loads[slot] = self._loads[slot] + load if slot in self._loads else load
        return super().routing_losses(found, batch)

    @torch.no_grad()
    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Moves the biases by what was counted since the last step, on all ranks alike."""
        if not self._loads:
            return
        loads = over_ranks(torch.cat(list(self._loads.values()))).split([len(own) for own in self._loads.values()])
        for slot, load in zip(self._loads, loads, strict=True):
            router = self.adapted[slot].router
            assert isinstance(router, BiasedRouter)
            load = load.double()
            router.bias += self.bias_step * (load.mean() - load).sign().to(router.bias)
        self._loads = {}
