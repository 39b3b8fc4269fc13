"""The gated low-rank operation: y = W0 x + bias + s B C(x) A x for every core that follows from a `Gate`.

In eager mode it is one autograd node (`function`) that writes into the base's own output; without gradients, factors
may be given ready (`Prepared`), so that a decoding step casts and stacks nothing. Under torch.compile it is plain
functional torch, which the compiler fuses itself, or for Triton one functional operator (`ops`).
"""

import os
from importlib.util import find_spec
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor, nn

from moe_peft.kernels import eager
from moe_peft.kernels.eager import Plan
from moe_peft.kernels.function import GatedLinear, update_
from moe_peft.kernels.operands import Prepared, flat, plan_of, stacked, transposed
from moe_peft.kernels.reference import Gate, apply_gate, gate_weights

Kernels = Literal["auto", "torch", "triton"]
"""What computes updates: "auto" takes Triton's kernels on a GPU and torch elsewhere."""
INSTALLED = find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def gated_linear(
    x: Tensor,
    base: nn.Linear,
    a: Tensor,
    b: Tensor,
    gate: Gate,
    scale: float,
    dropout: float = 0.0,
    kernels: Kernels = "auto",
) -> Tensor:
    """Returns base(x) + s B C A x: [..., O].

    Args:
        x: [..., D].
        base: a frozen linear, or what behaves like one.
        a: A [R, D], or [B, R, D]: one for each row of the batch.
        b: B [O, Q] or [B, O, Q].
        gate: what decides the core.
        scale: s.
        dropout: probability that an element of x is dropped before A; the scores see all of x.
        kernels: what computes it.
    """
    if _plain(base) and not torch.compiler.is_compiling() and not torch.is_autocast_enabled(x.device.type):
        plan, beta = plan_of(x, a.shape[-2], gate, scale, dropout)
        steps = backend(kernels, x.is_cuda, plan, _experts(gate))
        return GatedLinear.apply(None, x, base.weight, base.bias, a, b, gate.rows, gate.alpha, beta, plan, steps)
    return gated_update(_output(base, x), x, a, b, gate, scale, dropout, kernels)


def gated_update(
    y: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    gate: Gate,
    scale: float,
    dropout: float = 0.0,
    kernels: Kernels = "auto",
) -> Tensor:
    """Returns y + s B C A x in the dtype of y, in place where autograd and the compiler allow it.

    Args:
        y: [..., O], a base's fresh output; its contents are overwritten in eager mode.
        x: see `gated_linear`, as all others.
        a: A.
        b: B.
        gate: what decides the core.
        scale: s.
        dropout: on the input of A.
        kernels: what computes it.
    """
    x = x.to(y.dtype)  # under autocast y has another one
    plan, beta = plan_of(x, a.shape[-2], gate, scale, dropout)
    steps = backend(kernels, x.is_cuda, plan, _experts(gate))
    if torch.compiler.is_compiling():
        if steps is eager:
            return functional_update(y, x, a, b, gate, scale, dropout)
        return operator_update(y, x, a, b, gate, plan, beta)
    if not y.is_contiguous() or (y.is_leaf and y.requires_grad):
        y = y.clone(memory_format=torch.contiguous_format)
    return GatedLinear.apply(y, x, None, None, a, b, gate.rows, gate.alpha, beta, plan, steps)


def gated_inference(x: Tensor, base: nn.Linear, ready: Prepared, kernels: Kernels = "auto") -> Tensor:
    """Returns what `gated_linear` does, without gradients and dropout.

    Args:
        x: [..., D].
        base: a frozen linear, or what behaves like one.
        ready: made for inputs like x.
        kernels: what computes it.
    """
    y, (w, bt, plan, alpha, beta) = _output(base, x).contiguous(), ready
    experts = w.shape[-2] - plan.rank if alpha is not None else 0 if beta is None else beta.shape[-1]
    steps = backend(kernels, x.is_cuda, plan, experts)
    update_(flat(y, w), flat(x.to(w.dtype), w), w, bt, plan, alpha, beta, None, steps)
    return y


def _plain(base: nn.Linear) -> bool:
    """Whether a base is its product and nothing else, so that it can be a part of the operation."""
    return type(base) is nn.Linear and not _hooked(base)


def _hooked(base: nn.Module) -> bool:
    hooks = (base._forward_hooks, base._forward_pre_hooks, base._backward_hooks, base._backward_pre_hooks)
    return any(hooks)


def _output(base: nn.Linear, x: Tensor) -> Tensor:
    """Returns the base's output, free to be written into: a hook may keep, or watch, its own."""
    y = base(x)
    return y.clone() if _hooked(base) else y


def _experts(gate: Gate) -> int:
    """Returns E; 0 for the identity."""
    weights = gate.beta if gate.rows is None else gate.rows.mT
    return 0 if weights is None else weights.shape[-1]


def functional_update(y: Tensor, x: Tensor, a: Tensor, b: Tensor, gate: Gate, scale: float, dropout: float) -> Tensor:
    """Returns y + s B C A x, out of place, as torch operations that a compiler can fuse."""
    dropped = torch.dropout(x, dropout, True) if dropout else x
    a, b = a.to(y.dtype), b.to(y.dtype)
    o = dropped @ a.mT
    if gate.form != "identity":
        scores = None if gate.rows is None else (x @ gate.rows.to(y.dtype).mT).to(gate.rows.dtype)
        o = apply_gate(o, gate_weights(scores, gate.alpha, gate.beta), gate.form).to(y.dtype)
    return y + scale * (o @ b.mT)


def operator_update(y: Tensor, x: Tensor, a: Tensor, b: Tensor, gate: Gate, plan: Plan, beta: Tensor | None) -> Tensor:
    """Returns y + s B C A x, out of place, as the one operator that holds the Triton kernels; see `plan_of`."""
    from moe_peft.kernels import gpu, ops

    w, bt = stacked(a, gate.rows, y.dtype), transposed(b, y.dtype)
    inputs = flat(x, w)
    noise = gpu.draw(inputs, plan)
    return ops.gated_update(flat(y, w), inputs, w, bt, gate.alpha, beta, noise, *plan, "gpu")[0].view_as(y)


def backend(kernels: Kernels, on_gpu: bool, plan: Plan | None = None, experts: int = 0) -> ModuleType:
    """Returns the module whose functions compute updates.

    Args:
        kernels: what was asked for; "auto" leaves to torch what is too large for a GPU kernel.
        on_gpu: where the tensors are.
        plan: what is fixed about the update in question, if any.
        experts: E.

    Raises:
        ValueError: Triton was asked for where it cannot run.
    """
    if kernels == "triton" and not (INSTALLED and (on_gpu or INTERPRETED)):
        raise ValueError("kernels: triton needs the package triton and a GPU; use auto or torch")
    if kernels == "torch" or (kernels == "auto" and not (INSTALLED and on_gpu)):
        return eager
    from moe_peft.kernels import gpu

    return eager if kernels == "auto" and plan is not None and not gpu.fits(plan.form, plan.rank, experts) else gpu


def check_kernels(kernels: Kernels) -> None:
    """Raises a ValueError for an unknown name, or for Triton on a machine where it cannot run."""
    if kernels not in ("auto", "torch", "triton"):
        raise ValueError(f"kernels: {kernels!r} is unknown; use auto, torch or triton")
    backend(kernels, torch.cuda.is_available())
