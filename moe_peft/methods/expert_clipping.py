"""Gradient clipping where parameters belong to experts: every expert by its own norm, as if it were trained alone.

    n_e = sqrt(Σ over layers and cores of ||g_e||² + ||g of the expert's head||²)
    g_e <- g_e · min(1, c / (n_e + 1e-6))

The constant is torch's own. Shapes: E experts.
"""

from typing import TYPE_CHECKING

import torch
from torch.distributed import all_reduce
from torch.nn.utils import clip_grad_norm_

from moe_peft.methods.training import Part
from moe_peft.optim import parameter_groups
from moe_peft.sharding import is_sharded, local, rows_of

if TYPE_CHECKING:
    from moe_peft.methods.base import MultitaskModule


class ExpertClipping(Part):
    """The part of a method whose experts learn one by one: a common norm would couple them."""

    shares_gradients = False
    """Whether every expert takes the mean of all experts' gradients, after clipping (see `SharedStart`)."""

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips each expert, with its head, by its own norm, and every other group by one.

        One common norm would couple the experts: each would learn otherwise than alone.
        """
        if all(parameter.grad is None for parameter in self.parameters()):
            return  # what learns has no gradient; torch clips no empty list by value
        if gradient_clip_val and gradient_clip_algorithm in (None, "norm"):
            clip_per_expert(self._module(), float(gradient_clip_val))
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        if self.shares_gradients:
            share_gradients(self._module())


@torch.no_grad()
def share_gradients(module: "MultitaskModule") -> None:
    """Gives every expert the mean of all experts' gradients; heads keep their own.

    Args:
        module: its adapters are stacked [E, ...].
    """
    for parameter in parameter_groups(module)["adapters"]:
        if parameter.grad is not None:
            parameter.grad.copy_(parameter.grad.mean(0, keepdim=True).expand_as(parameter.grad))


@torch.no_grad()
def clip_per_expert(module: "MultitaskModule", bound: float) -> None:
    """Clips stacked adapters and heads expert by expert, and every other group by one norm each.

    Args:
        module: its adapters are stacked [E, ...], one expert per task; its heads' rows belong to tasks.
        bound: c.
    """
    groups = parameter_groups(module)
    experts = torch.arange(len(module.specs), device=module.device)
    owners = {"adapters": experts, "heads": module.heads.owner if module.heads is not None else experts}
    own = [
        (local(parameter.grad), owner[rows_of(parameter)])
        for group, owner in owners.items()
        for parameter in groups.pop(group, ())
        if parameter.grad is not None
    ]
    if own:
        squares = own[0][0].new_zeros(len(experts))
        for gradient, owner in own:
            squares.index_add_(0, owner, gradient.flatten(1).square().sum(1) if gradient.dim() > 1 else gradient**2)
        if is_sharded(module):
            all_reduce(squares)
        factor = (bound / (squares.sqrt() + 1e-6)).clamp(max=1)
        for gradient, owner in own:
            gradient.mul_(factor[owner].view(-1, *(1,) * (gradient.dim() - 1)))
    for parameters in groups.values():
        clip_grad_norm_(parameters, bound)
