"""What an update's products take: inputs flattened, factors cast, stacked and transposed, the gate's β as rows."""

from typing import NamedTuple

import torch
from torch import Tensor

from moe_peft.kernels.eager import Plan
from moe_peft.kernels.reference import Gate

FEW = 32
"""Tokens up to which a CPU takes longer to start a product in half precision than to do it in fp32."""


class Prepared(NamedTuple):
    """All that an update needs besides its input."""

    w: Tensor
    """[A; W_r] as [R + E, D], or one for each row of the batch [B, R + E, D]."""
    bt: Tensor
    """Bᵀ [Q, O] or [B, Q, O]."""
    plan: Plan
    alpha: Tensor | None
    beta: Tensor | None
    """β [M / every, E]."""


def prepare(x: Tensor, a: Tensor, b: Tensor, gate: Gate, scale: float, dtype: torch.dtype) -> Prepared:
    """Casts, stacks and transposes factors for inputs like x.

    Args:
        x: [..., D].
        a: A [R, D], or [B, R, D]: one for each row of the batch.
        b: B [O, Q] or [B, O, Q].
        gate: what decides the core.
        scale: s.
        dtype: of the products: the base's; for few tokens on a CPU fp32 at least.
    """
    plan, beta = plan_of(x, a.shape[-2], gate, scale, 0.0)
    if not x.is_cuda and x.shape[:-1].numel() <= FEW:
        dtype = torch.promote_types(dtype, torch.float32)
    w = stacked(a, gate.rows, dtype)
    w = w.clone() if w is a else w  # like Bᵀ, a copy: what is changed in place must not change half of it
    return Prepared(w, transposed(b, dtype), plan, gate.alpha, beta)


def stacked(a: Tensor, rows: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Returns [A; W_r] in the dtype of the products: [R + E, D], or [B, R + E, D] where rows have their own A."""
    if rows is not None:
        a = torch.cat([a, rows if a.dim() == 2 else rows.expand(len(a), -1, -1)], -2)
    return a.to(dtype).contiguous()  # a tensor train's A comes transposed, which costs products threefold


def transposed(b: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns Bᵀ [Q, O] or [B, Q, O] whose rows are contiguous: products with a tall, narrow B cost up to threefold."""
    return b.mT.to(dtype, memory_format=torch.contiguous_format).contiguous()  # the first makes no copy of its dtype


def flat(tensor: Tensor, w: Tensor) -> Tensor:
    """Brings [..., D] to [M, D] for shared factors, to [B, S, D] for one pair of factors for each row."""
    lead = (-1,) if w.dim() == 2 else (len(tensor), -1)
    return tensor.reshape(*lead, tensor.shape[-1])


def plan_of(x: Tensor, rank: int, gate: Gate, scale: float, dropout: float) -> tuple[Plan, Tensor | None]:
    """Returns the plan of an update and β as [M / every, E]."""
    beta, lead = gate.beta, x.shape[:-1]
    if beta is None:
        return Plan(gate.form, rank, max(1, lead.numel()), scale, dropout), None
    own = beta.shape[:-1]
    if own.numel() == 1:
        every = max(1, lead.numel())
    elif own[0] == lead[0] and own[1:].numel() == 1:
        every = max(1, lead[1:].numel())
    else:
        every, beta = 1, beta.expand(*lead, -1)
    return Plan(gate.form, rank, every, scale, dropout), beta.reshape(-1, beta.shape[-1])
