"""Which rows of which tensors belong to which expert: what keeps a copy of some experts, and brings it back."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from moe_peft.sharding import assign, whole

if TYPE_CHECKING:
    from moe_peft.methods.base import MultitaskModule


def expert_rows(module: "MultitaskModule") -> dict[str, tuple[nn.Parameter, Tensor]]:
    """Returns everything that belongs to experts, by name: the parameter and the expert of each of its rows.

    Args:
        module: with an expert per task, stacked in the factors of its linears.
    """
    tasks = torch.arange(len(module.specs))
    cores = {
        f"{slot}.{at}": (core, tasks)
        for slot, layer in module.adapted.items()
        for at, core in enumerate(layer.factors.parameters())
    }
    if module.heads is None:
        return cores
    return cores | {f"heads.{name}": (p, module.heads.owner.cpu()) for name, p in module.heads.named_parameters()}


@torch.no_grad()
def with_experts(module: "MultitaskModule", snapshot: dict[str, Tensor], experts: list[int]) -> dict[str, Tensor]:
    """Returns a snapshot with some experts renewed from the module; a first (empty) snapshot takes all of them."""
    new = {}
    for name, (parameter, owner) in expert_rows(module).items():
        now = whole(parameter).cpu()
        rows = torch.isin(owner, torch.tensor(experts)).view(-1, *(1,) * (now.dim() - 1))
        new[name] = torch.where(rows, now, snapshot[name]) if name in snapshot else now.clone()
    return new


@torch.no_grad()
def load_experts(module: "MultitaskModule", snapshot: dict[str, Tensor]) -> None:
    """Copies the experts of a snapshot into the module."""
    for name, (parameter, _) in expert_rows(module).items():
        assign(parameter, snapshot[name])
