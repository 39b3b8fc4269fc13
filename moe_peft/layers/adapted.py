"""AdaptedLinear: a frozen linear plus a gated low-rank update.

    y = W0 x + s * B C(x) A x

Shapes: B batch, S sequence, D in, O out, R rows of A, Q columns of B.
"""

import torch
from torch import Tensor, nn

from moe_peft.context import RoutingContext
from moe_peft.kernels.dispatch import expand, shrink
from moe_peft.kernels.gated import gated_inference, gated_linear, gated_update
from moe_peft.kernels.operands import Prepared, prepare
from moe_peft.kernels.reference import Gate, apply_core
from moe_peft.layers.factors import Factors
from moe_peft.layers.routers import Router


class AdaptedLinear(nn.Module):
    """A frozen `nn.Linear` with an adapter.

    Args:
        base: the linear to adapt; its parameters are frozen here.
        factors: what is stored (A and B).
        router: what decides the core; None for the identity (plain LoRA).
        scale: s.
        dropout: probability on the adapter's input (the router reads the input before it, as in the official T-REX).
        context: the model's routing context.
        slot: this linear's name in the model, unique.
    """

    def __init__(
        self,
        base: nn.Linear,
        factors: Factors,
        router: Router | None,
        scale: float,
        dropout: float,
        context: RoutingContext,
        slot: str,
    ) -> None:
        super().__init__()
        if router is None and factors.rank_in != factors.rank_out:
            raise ValueError(f"{slot}: factors of ranks {factors.rank_in} and {factors.rank_out} need a router's core")
        self.base = base.requires_grad_(False)
        self.factors, self.router = factors, router
        self.scale, self.dropout, self.slot, self._held = scale, dropout, slot, f"{slot}.ready"
        self.context = context
        self.register_parameter("original", None)
        """W0 while the base's own weight is a merged one (`merge`), else None."""
        self.register_parameter("original_bias", None)
        """Its bias likewise, if it has any."""

    @property
    def weight(self) -> Tensor:
        """The base weight [O, D]: some models read it off their linears."""
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        """The base bias [O]."""
        return self.base.bias

    @property
    def in_features(self) -> int:
        """D."""
        return self.base.in_features

    @property
    def out_features(self) -> int:
        """O."""
        return self.base.out_features

    @property
    def active_dropout(self) -> float:
        """The probability that applies now: none outside training."""
        return self.dropout if self.training else 0.0

    def rank_space(self, x: Tensor, a: Tensor) -> Tensor:
        """Returns C(x) A x [..., Q] in fp32 for the core that the router's `forward` gives."""
        assert self.router is not None
        rows = self.router.rows()
        if self.active_dropout:
            h = shrink(torch.dropout(x, self.active_dropout, True), a)
            scores = None if rows is None else shrink(x, rows)
        elif rows is None:
            h, scores = shrink(x, a), None
        else:
            h, scores = shrink(x, torch.cat([a, rows])).split([a.shape[0], rows.shape[0]], -1)
        return apply_core(h.to(a.dtype), self.router(x, h, scores, self.context, self.slot))

    def active_factors(self, rows: int) -> tuple[Tensor, Tensor]:
        """Returns A [R, D] and B [O, Q] for a batch of so many rows."""
        return self.factors()

    def gate(self, x: Tensor) -> Gate | None:
        """Returns what decides the core of each token; None where only the router's `forward` knows."""
        return Gate() if self.router is None else self.router.gate(x, self.context, self.slot)

    def delta(self, x: Tensor) -> Tensor:
        """Returns the update alone, s * B C(x) A x: [..., O]."""
        return self._update(x.new_zeros(*x.shape[:-1], self.out_features), x, self.gate(x))

    def forward(self, x: Tensor) -> Tensor:
        """Returns W0 x + bias + delta(x): [..., O] in the base's dtype; merged, that is one plain linear."""
        if self.original is not None:
            return self._merged_forward(x, self.original)
        if not self.context.enabled:
            return self.base(x)
        trained = torch.is_grad_enabled() or self.training
        if not (trained or torch.compiler.is_compiling()):
            ready = self.ready(x)
            if ready is not None:
                return gated_inference(x, self.base, ready, self.context.kernels)
        gate = self.gate(x)
        if gate is None:
            return self._update(self.base(x), x, None)
        a, b = self.active_factors(len(x))
        return gated_linear(x, self.base, a, b, gate, self.scale, self.active_dropout, self.context.kernels)

    def ready(self, x: Tensor) -> Prepared | None:
        """Returns what inference needs for inputs like x, made once per batch; None without a gate."""
        if not self.context.begun:
            return self._prepared(x)
        return self.context.hold(self._held, x.shape[:-1], lambda: self._prepared(x))

    def _prepared(self, x: Tensor) -> Prepared | None:
        gate = self.gate(x)
        if gate is None:
            return None
        return prepare(x, *self.active_factors(len(x)), gate, self.scale, self.weight.dtype)

    def _update(self, y: Tensor, x: Tensor, gate: Gate | None) -> Tensor:
        a, b = self.active_factors(len(x))
        if gate is None:
            return expand(y, self.rank_space(x, a), b, self.scale)
        return gated_update(y, x, a, b, gate, self.scale, self.active_dropout, self.context.kernels)

    @property
    def merged(self) -> bool:
        """Whether the base's weight holds the update."""
        return self.original is not None

    def _merged_forward(self, x: Tensor, original: Tensor) -> Tensor:
        if self.training:
            raise ValueError(f"{self.slot} is merged, which leaves nothing to train: call unmerge() before training")
        if not self.context.enabled:
            return nn.functional.linear(x, original, self.original_bias)
        return self.base(x)

    @property
    def depends_on_task(self) -> bool:
        """Whether a fixed update exists for one task at a time only, if at all."""
        return self.router is not None

    def fixed_core(self, task: int) -> Tensor | None:
        """Returns a task's core, if it is no identity (see `Router.static_core`)."""
        return None if self.router is None else self.router.static_core(task)

    def fixed_factors(self, task: int) -> tuple[Tensor, Tensor]:
        """Returns the factors A [R, D] and B [O, Q] that serve a task."""
        return self.factors()

    @torch.no_grad()
    def merged_weight(self, core: Tensor | None = None, task: int = 0) -> Tensor:
        """Returns W0 + s * B C A [O, D] for a fixed core, computed in fp32 and cast to the base's dtype.

        Args:
            core: None (identity), [R] (diagonal) or [Q, R].
            task: whose factors, where tasks have their own.
        """
        a, b = self.fixed_factors(task)
        with torch.autocast(a.device.type, enabled=False):
            delta = self.scale * b @ (a if core is None else core.unsqueeze(-1) * a if core.dim() == 1 else core @ a)
        weight = self.base.weight if self.original is None else self.original
        return (weight.to(delta.dtype) + delta).to(weight.dtype)

    def merged_bias(self, task: int = 0) -> Tensor | None:
        """Returns the bias [O] that belongs to the merged weight of a task: the base's own."""
        return self.base.bias if self.original is None else self.original_bias

    def merge(self, core: Tensor | None = None, task: int = 0) -> None:
        """Puts `merged_weight(core, task)` in the base's place and keeps W0 itself, so that no rounding is lost.

        Args:
            core: see `merged_weight`.
            task: see `merged_weight`.

        Raises:
            ValueError: it is merged already.
        """
        if self.merged:
            raise ValueError(f"{self.slot} is merged already: call unmerge() first")
        weight, bias = self.merged_weight(core, task), self.merged_bias(task)
        self.original, self.base.weight = self.base.weight, nn.Parameter(weight, requires_grad=False)
        if bias is not None:
            self.original_bias, self.base.bias = self.base.bias, nn.Parameter(bias, requires_grad=False)

    def unmerge(self) -> None:
        """Puts W0 back, the very tensor that `merge` took away.

        Raises:
            ValueError: it is not merged.
        """
        if self.original is None:
            raise ValueError(f"{self.slot} is not merged: there is nothing to take back")
        self.base.weight, self.original = self.original, None
        if self.original_bias is not None:
            self.base.bias, self.original_bias = self.original_bias, None
