"""A frozen linear whose output is transformed, for methods that add no low-rank update to it.

    y = f(W0 x + b)

What f is, a subclass says. Where f is linear (`is_linear`), it is merged into W0 and b; no such adapter is a LoRA.
Shapes: B batch, S sequence, O out.
"""

from typing import ClassVar, NoReturn

import torch
from torch import Tensor, nn

from moe_peft.context import RoutingContext
from moe_peft.layers.adapted import AdaptedLinear
from moe_peft.layers.factors import Factors


class TransformedLinear(AdaptedLinear):
    """Base of such linears; a subclass gives `transform`, and `transformed` where f is linear.

    Args:
        base: the linear.
        factors: what f is made of.
        context: the model's routing context.
        slot: this linear's name in the model, unique.
    """

    is_linear: ClassVar[bool] = True
    """Whether f is a linear map of each row, so that it can be merged."""

    def __init__(self, base: nn.Linear, factors: Factors, context: RoutingContext, slot: str) -> None:
        super().__init__(base, factors, None, 1.0, 0.0, context, slot)

    def transform(self, z: Tensor) -> Tensor:
        """Returns f(z) [B, ..., O] of the base's output z, in its dtype."""
        raise TypeError(f"{type(self).__name__} must implement transform(z)")

    def transformed(self, z: Tensor, task: int) -> Tensor:
        """Returns f(z) [..., O] in fp32 as it is for the rows of a task."""
        raise TypeError(f"{type(self).__name__} must implement transformed(z, task)")

    def tasks_of(self, z: Tensor) -> Tensor:
        """Returns the rows' tasks [B].

        Raises:
            ValueError: they are not known.
        """
        tasks = self.context.get("task_id", len(z))
        if tasks is None:
            raise ValueError(f"{self.slot} knows no tasks of these rows: go through the module's forward")
        return tasks

    def delta(self, x: Tensor) -> Tensor:
        """Returns what f changes: [..., O]."""
        z = self.base(x)
        return self.transform(z) - z

    def forward(self, x: Tensor) -> Tensor:
        """Returns f(W0 x + b): [..., O] in the base's dtype; merged, that is one plain linear."""
        if self.original is not None:
            return self._merged_forward(x, self.original)
        z = self.base(x)
        return self.transform(z) if self.context.enabled else z

    def fixed_core(self, task: int) -> None:
        """Returns the identity: there is no rank space."""

    def fixed_factors(self, task: int) -> NoReturn:
        """Refuses: there are no A and B.

        Raises:
            ValueError: always.
        """
        form = "merged or adapter" if self.is_linear else "adapter"
        raise ValueError(f"{self.slot}: it transforms outputs, which is no LoRA; export it to {form}")

    @torch.no_grad()
    def merged_weight(self, core: Tensor | None = None, task: int = 0) -> Tensor:
        """Returns f(W0) [O, D], computed in fp32 and cast to the base's dtype.

        Args:
            core: of no meaning here.
            task: whose f.

        Raises:
            ValueError: f is not linear.
        """
        if not self.is_linear:
            raise ValueError(f"{self.slot}: its adapter bends what it is given, so it cannot be merged or be a LoRA")
        weight = self.base.weight if self.original is None else self.original
        with torch.autocast(weight.device.type, enabled=False):
            return self.transformed(weight.float().mT, task).mT.to(weight.dtype).contiguous()

    @torch.no_grad()
    def merged_bias(self, task: int = 0) -> Tensor | None:
        """Returns f(b) [O], if there is a bias."""
        bias = super().merged_bias(task)
        return None if bias is None else self.transformed(bias.float(), task).to(bias.dtype)
