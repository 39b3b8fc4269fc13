"""Figures of a forward and backward that no machine changes: operations, FLOPs, bytes kept, the largest tensor.

Operations are what reaches the dispatcher, without views, which compute nothing. Bytes kept for backward count every
storage once; the input and the stored weights, which are kept by reference, stand apart.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode


class Product(NamedTuple):
    """A matrix product [rows, inner] x [inner, columns] of the closed formula."""

    name: str
    rows: int
    inner: int
    columns: int
    gradients: int
    """Of how many of its two factors backward makes the gradient: each is a product of the same size."""
    forward: int = 1
    """0 for what is no matrix product in the forward."""

    @property
    def flops(self) -> int:
        """Multiplications and additions of one such product."""
        return 2 * self.rows * self.inner * self.columns


def _in_place(y: Sequence[int], one: Sequence[int], two: Sequence[int], **_: Any) -> int:
    return 2 * math.prod(one) * two[-1]


IN_PLACE = {torch.ops.aten.addmm_: _in_place, torch.ops.aten.baddbmm_: _in_place}
"""Products that torch's counter does not know."""


class Figures(NamedTuple):
    """What one forward and one backward take; the backward's are 0 where there is none."""

    parameters: int
    operations_forward: int
    operations_backward: int
    flops_forward: int
    flops_backward: int
    formula_forward: int
    """FLOPs of the closed formula."""
    formula_backward: int
    kept_bytes: int
    """Kept for backward, besides input and weights."""
    kept_input_bytes: int
    kept_weight_bytes: int
    largest: int
    """Numbers in the largest tensor made."""
    peak_bytes: int
    """Device memory beside what was there before; 0 on a CPU."""


class Tally(TorchDispatchMode):
    """Counts dispatched operations that are no views, and the largest tensor that one of them made."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[str] = []
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Counts one operation."""
        result = func(*args, **(kwargs or {}))
        if not func.is_view and func is not torch.ops.aten._unsafe_view.default:
            self.operations.append(str(func))
            made = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
            self.largest = max(self.largest, *made, 0)
        return result


class Kept:
    """Collects what autograd keeps: every storage once, alive, so that no address comes twice."""

    def __init__(self) -> None:
        self.storages: dict[int, tuple[Tensor, int]] = {}

    def pack(self, tensor: Tensor) -> Tensor:
        """Notes a tensor's storage."""
        storage = tensor.untyped_storage()
        self.storages.setdefault(storage.data_ptr(), (tensor.detach(), storage.nbytes()))
        return tensor

    def take(self, of: Iterable[Tensor]) -> int:
        """Returns the bytes of these tensors' storages among what is kept, and strikes them off."""
        found = [self.storages.pop(tensor.untyped_storage().data_ptr(), None) for tensor in of]
        return sum(entry[1] for entry in found if entry is not None)


def formula(products: Sequence[Product]) -> tuple[int, int]:
    """Returns the FLOPs of a forward and of its backward by the closed formula."""
    return sum(one.forward * one.flops for one in products), sum(one.gradients * one.flops for one in products)


def formula_text(products: Sequence[Product]) -> str:
    """Writes the closed formula out: each product, and how often forward and backward take it."""
    each = (
        f"{one.name}: 2·{one.rows}·{one.inner}·{one.columns} x ({one.forward} + {one.gradients})" for one in products
    )
    return "; ".join(each)


def take_figures(
    forward: Callable[[Tensor], Tensor],
    x: Tensor,
    trained: Mapping[str, Tensor],
    stored: Sequence[Tensor],
    upstream: Tensor | None,
    products: Sequence[Product],
) -> Figures:
    """Measures one forward, and one backward where there is an upstream gradient.

    Args:
        forward: x -> y.
        x: the input.
        trained: tensors whose gradients are asked for.
        stored: all tensors of the adapter that stay from step to step.
        upstream: dY; None measures a forward without gradients.
        products: the closed formula.
    """
    kept, tallies, flops = Kept(), (Tally(), Tally()), [0, 0]
    before = _reset_peak(x.device)
    with torch.set_grad_enabled(upstream is not None), saved_tensors_hooks(kept.pack, lambda tensor: tensor):
        with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter, tallies[0]:
            y = forward(x)
        flops[0] = counter.get_total_flops()
    if upstream is not None:
        with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter, tallies[1]:
            torch.autograd.grad(y, [x, *trained.values()], upstream)
        flops[1] = counter.get_total_flops()
    expected = formula(products)
    bytes_of_input, bytes_of_weights = kept.take([x]), kept.take([*trained.values(), *stored])
    return Figures(
        parameters=sum(weight.numel() for weight in trained.values()),
        operations_forward=len(tallies[0].operations),
        operations_backward=len(tallies[1].operations),
        flops_forward=flops[0],
        flops_backward=flops[1],
        formula_forward=expected[0],
        formula_backward=expected[1] if upstream is not None else 0,
        kept_bytes=sum(size for _, size in kept.storages.values()),
        kept_input_bytes=bytes_of_input,
        kept_weight_bytes=bytes_of_weights,
        largest=max(tally.largest for tally in tallies),
        peak_bytes=torch.cuda.max_memory_allocated(x.device) - before if x.is_cuda else 0,
    )


def _reset_peak(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)
