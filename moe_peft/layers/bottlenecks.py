"""Bottleneck adapters behind a frozen linear, one for all rows or one per task, and their fusion by attention.

    u_e(z) = U_e relu(D_e z + d_e) + b_e               z = W0 x + b, the linear's output
    y = z + s u_t(z)                                   t the row's task, or the only adapter
    y = z + s V Σ_e g_e u_e(z),  g = softmax_e((Q z + q) · K u_e(z))

No [tokens, experts, O] tensor is made: (Q z + q) · K u_e is a product in the bottleneck, of Uᵀ Kᵀ (Q z + q) and relu.
A bias of K would add the same to all scores. Shapes: B rows, S tokens, O outputs, E adapters, m width.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from moe_peft.context import Routing, RoutingContext
from moe_peft.layers.factors import Factors
from moe_peft.layers.routers import Router
from moe_peft.layers.transformed import TransformedLinear

ALONE = "alone"
"""The fact [B] that fusion is left out: which adapter serves each row."""
IDENTITY = "identity"
"""The loss term: how far V is from the identity."""


class Bottlenecks(Factors):
    """E adapters O -> m -> O; D starts Kaiming-uniform (a = √5), everything else at zero, so that they add nothing.

    Args:
        outputs: O.
        width: m.
        experts: E.
        device: where to create them.
    """

    def __init__(self, outputs: int, width: int, experts: int, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.rank_in = self.rank_out = width
        options = {"device": device, "dtype": torch.float32}
        self.down = nn.Parameter(torch.empty(experts, width, outputs, **options))
        self.down_bias = nn.Parameter(torch.zeros(experts, width, **options))
        self.up = nn.Parameter(torch.zeros(experts, outputs, width, **options))
        self.up_bias = nn.Parameter(torch.zeros(experts, outputs, **options))
        nn.init.uniform_(self.down, -(outputs**-0.5), outputs**-0.5)

    def forward(self) -> tuple[Tensor, Tensor]:
        """Returns D [E m, O] and U [O, E m], adapter by adapter."""
        return self.down.flatten(0, 1), self.up.transpose(0, 1).flatten(1)

    def one(self, z: Tensor) -> Tensor:
        """Returns u(z) [..., O] of the only adapter."""
        down, up = self()
        hidden = linear(z, down.to(z.dtype), self.down_bias[0].to(z.dtype)).relu()
        return linear(hidden, up.to(z.dtype), self.up_bias[0].to(z.dtype))

    def of(self, z: Tensor, chosen: Tensor) -> Tensor:
        """Returns u_e(z) [B, S, O] of one adapter e for each row, `chosen` [B]."""
        down, up, first, last = (
            own.index_select(0, chosen).to(z.dtype) for own in (self.down, self.up, self.down_bias, self.up_bias)
        )
        return torch.baddbmm(last.unsqueeze(1), torch.baddbmm(first.unsqueeze(1), z, down.mT).relu(), up.mT)


class Fusion(Router):
    """Attention of a token over the outputs of all adapters. V starts at the identity, Q and K at N(0, 0.02).

    Args:
        outputs: O.
        device: where to create the parameters.
    """

    def __init__(self, outputs: int, device: torch.device | str | None = None) -> None:
        super().__init__()
        options = {"device": device, "dtype": torch.float32}
        self.query = nn.Linear(outputs, outputs, **options)
        self.key, self.value = (nn.Linear(outputs, outputs, bias=False, **options) for _ in range(2))
        for own in (self.query, self.key):
            nn.init.normal_(own.weight, std=0.02)
        nn.init.zeros_(self.query.bias)
        nn.init.eye_(self.value.weight)

    def distance(self) -> Tensor:
        """Returns ‖1 - V‖², the sum over all elements."""
        return (self.value.weight - torch.eye(len(self.value.weight), device=self.value.weight.device)).square().sum()

    def fused(self, z: Tensor, adapters: Bottlenecks, context: RoutingContext, slot: str) -> Tensor:
        """Returns V Σ_e g_e u_e(z) [..., O]."""
        (down, up), dtype = adapters(), z.dtype
        experts, width = adapters.down.shape[:2]
        up, last = up.to(dtype), adapters.up_bias.to(dtype)
        hidden = linear(z, down.to(dtype), adapters.down_bias.flatten().to(dtype)).relu()
        asked = linear(z, self.query.weight.to(dtype), self.query.bias.to(dtype)) @ self.key.weight.to(dtype)
        scores = ((asked @ up).float() * hidden.float()).unflatten(-1, (experts, width)).sum(-1)
        g = (scores + (asked @ last.mT).float()).softmax(-1)
        context.record(slot, Routing(g.detach()))
        weighed = (hidden.unflatten(-1, (experts, width)) * g.to(dtype).unsqueeze(-1)).flatten(-2)
        return linear(linear(weighed, up) + g.to(dtype) @ last, self.value.weight.to(dtype))


class BottleneckLinear(TransformedLinear):
    """A frozen linear with adapters behind it.

    Args:
        base: the linear.
        factors: the adapters.
        scale: s.
        context: the model's routing context.
        slot: this linear's name in the model, unique.
        fusion: what joins them; None serves each row with its own task's, or all with the only one.
    """

    is_linear: ClassVar[bool] = False
    factors: Bottlenecks

    def __init__(
        self,
        base: nn.Linear,
        factors: Bottlenecks,
        scale: float,
        context: RoutingContext,
        slot: str,
        fusion: Fusion | None = None,
    ) -> None:
        super().__init__(base, factors, context, slot)
        self.scale, self.router = scale, fusion

    @property
    def depends_on_task(self) -> bool:
        """Whether there are several adapters."""
        return len(self.factors.down) > 1

    def transform(self, z: Tensor) -> Tensor:
        """Returns z and what the adapters add to it."""
        if self.router is None:
            change = self.factors.of(z, self.tasks_of(z)) if self.depends_on_task else self.factors.one(z)
            return z + self.scale * change
        assert isinstance(self.router, Fusion)
        alone = self.context.get(ALONE, len(z))
        if alone is not None:
            return z + self.scale * self.factors.of(z, alone)
        if self.training:
            self.context.add_term(IDENTITY, self.slot, self.router.distance())
        return z + self.scale * self.router.fused(z, self.factors, self.context, self.slot)
