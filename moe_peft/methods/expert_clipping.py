"""Gradient clipping where parameters belong to experts: every expert by its own norm, as if it were trained alone.

    n_e = sqrt(Σ over layers and cores of ||g_e||² + ||g of the expert's head||²)
    g_e <- g_e · min(1, c / (n_e + 1e-6))

The constant is torch's own. Shapes: E experts.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from moe_peft.optim import parameter_groups

if TYPE_CHECKING:
    from moe_peft.methods.base import MultitaskModule


@torch.no_grad()
def clip_per_expert(module: "MultitaskModule", bound: float) -> None:
    """Clips stacked adapters and heads expert by expert, and every other group by one norm each.

    Args:
        module: its adapters are stacked [E, ...], one expert per task; its heads' rows belong to tasks.
        bound: c.
    """
    groups = parameter_groups(module)
    stacked = [parameter.grad for parameter in groups.pop("adapters", ()) if parameter.grad is not None]
    heads = [parameter.grad for parameter in groups.pop("heads", ()) if parameter.grad is not None]
    owner = module.heads.owner if module.heads is not None else None
    squares: Tensor | float = sum(gradient.flatten(1).square().sum(1) for gradient in stacked)
    for gradient in heads:
        assert owner is not None
        own = gradient.reshape(len(owner), -1).square().sum(1)
        squares = squares + own.new_zeros(len(module.specs)).index_add_(0, owner, own)
    if isinstance(squares, Tensor):
        factor = (bound / (squares.sqrt() + 1e-6)).clamp(max=1)
        for gradient in stacked:
            gradient.mul_(factor.view(-1, *(1,) * (gradient.dim() - 1)))
        for gradient in heads:
            gradient.mul_(factor[owner].view(-1, *(1,) * (gradient.dim() - 1)))
    for parameters in groups.values():
        clip_grad_norm_(parameters, bound)
