"""The update as two functional operators that torch.compile keeps whole: what the Triton kernels need, being no torch.

`moe_peft::gated_update` and its backward take the same steps as `function`, out of place. Both state their shapes for
tracing and their FLOPs for `torch.utils.flop_counter`.
"""

from importlib import import_module
from math import prod
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from moe_peft.kernels.eager import Plan
from moe_peft.kernels.function import update_


def _backend(name: str) -> ModuleType:
    return import_module(f"moe_peft.kernels.{name}")


def _or_nothing(tensor: Tensor | None, like: Tensor) -> Tensor:
    """Operators return tensors only, and state their strides."""
    return like.new_empty(0) if tensor is None else tensor.contiguous()


def _filled(tensor: Tensor) -> Tensor | None:
    return tensor if tensor.numel() else None


@torch.library.custom_op("moe_peft::gated_update", mutates_args=())
def gated_update(
    y: Tensor,
    x: Tensor,
    w: Tensor,
    bt: Tensor,
    alpha: Tensor | None,
    beta: Tensor | None,
    noise: Tensor | None,
    form: str,
    rank: int,
    every: int,
    scale: float,
    dropout: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns y + s B C A x, and what backward needs: z, o (empty where it is z) and p (empty where there is none).

    Args:
        y: [M, O], or [B, S, O] where rows have their own factors.
        x: [M, D] or [B, S, D].
        w: [A; W_r] as [R + E, D] or [B, R + E, D].
        bt: Bᵀ [Q, O] or [B, Q, O].
        alpha: [1], or None.
        beta: [M / every, E], or None.
        noise: what the backend's `draw` gave.
        form: see `reference`.
        rank: R.
        every: tokens that share a row of β.
        scale: s.
        dropout: on the input of A.
        backend: "eager" or "gpu".
    """
    y = y.clone(memory_format=torch.contiguous_format)
    plan = Plan(form, rank, every, scale, dropout)  # pyright: ignore[reportArgumentType]
    z, o, p = update_(y, x, w, bt, plan, alpha, beta, noise, _backend(backend))
    return y, z, _or_nothing(None if o is z else o, x), _or_nothing(p, x)


@gated_update.register_fake
def _(y: Tensor, x: Tensor, w: Tensor, bt: Tensor, alpha: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    form, rank, every, *_, backend = rest[2:]
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    (*rows, tokens), width, identity = x.shape[:-1], w.shape[-2], form == "identity"
    p = x.new_empty(0)
    if backend == "eager":
        z, o = x.new_empty(*rows, width, tokens), x.new_empty(*rows, bt.shape[-2], tokens)
        if alpha is not None and not identity:
            p = x.new_empty(*rows, width - rank, tokens // min(every, tokens), min(every, tokens), dtype=wide)
    else:
        z = x.new_empty(*x.shape[:-1], width, dtype=x.dtype if identity else wide)
        o = x.new_empty(*x.shape[:-1], bt.shape[-2])
    o = x.new_empty(0) if identity else o
    return torch.empty_like(y, memory_format=torch.contiguous_format), z, o, p


@torch.library.custom_op("moe_peft::gated_update_backward", mutates_args=())
def gated_update_backward(
    dy: Tensor,
    x: Tensor,
    w: Tensor,
    bt: Tensor,
    alpha: Tensor | None,
    beta: Tensor | None,
    noise: Tensor | None,
    z: Tensor,
    o: Tensor,
    p: Tensor,
    form: str,
    rank: int,
    every: int,
    scale: float,
    dropout: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns the gradients of x, w, bt, alpha and beta (empty where there is none); arguments as above."""
    steps = _backend(backend)
    plan = Plan(form, rank, every, scale, dropout)  # pyright: ignore[reportArgumentType]
    o = z if form == "identity" else o
    found = steps.backward_y(dy, bt, o, z, _filled(p), plan, alpha, beta, True)
    dx = steps.backward_x(found.dz, w, None, plan, noise)
    dw = steps.backward_w(found.dz, x, plan, noise)
    gates = _or_nothing(found.dalpha, x), _or_nothing(found.dbeta, x)
    return dx, dw.to(w.dtype), found.dbt.to(bt.dtype).contiguous(), *gates


@gated_update_backward.register_fake
def _(dy: Tensor, x: Tensor, w: Tensor, bt: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    gates = [x.new_empty(0) if gate is None else torch.empty_like(gate) for gate in rest[:2]]
    return (*(x.new_empty(tensor.shape) for tensor in (x, w, bt)), *gates)


def _keep(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    _, x, w, bt, alpha, beta, noise, *ctx.plan = inputs
    ctx.save_for_backward(x, w, bt, alpha, beta, noise, *output[1:])


def _backward(ctx: Any, dy: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
    alpha, beta = ctx.saved_tensors[3:5]
    dx, dw, dbt, dalpha, dbeta = gated_update_backward(dy, *ctx.saved_tensors, *ctx.plan)
    gates = None if alpha is None else dalpha, None if beta is None else dbeta
    return dy, dx, dw, dbt, *gates, *(None,) * 7


gated_update.register_autograd(_backward, setup_context=_keep)


def products(x: tuple[int, ...], w: tuple[int, ...], bt: tuple[int, ...]) -> int:
    """Returns the FLOPs of the two products of an update: 2 M ((R + E) D + Q O); the gate's are left out, as usual."""
    return 2 * prod(x[:-1]) * (w[-2] * w[-1] + bt[-2] * bt[-1])


@register_flop_formula(torch.ops.moe_peft.gated_update)
def _forward_flops(y: Any, x: Any, w: Any, bt: Any, *rest: Any, **also: Any) -> int:
    return products(x, w, bt)


@register_flop_formula(torch.ops.moe_peft.gated_update_backward)
def _backward_flops(dy: Any, x: Any, w: Any, bt: Any, *rest: Any, **also: Any) -> int:
    return 2 * products(x, w, bt)
