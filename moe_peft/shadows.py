"""Tensors without memory: a module runs on them as on a CPU, to see what it would compute and keep.

A shadow has a shape, a dtype, a device and a storage of the right size, but no values (`FakeTensor`, as torch.compile
traces with). Forwards ask for values nonetheless: for how many labels a row has, which positions are real. Those come
from a batch's ids, masks and labels alone, so small tensors whose every ingredient has values keep theirs.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

LARGE = 2**22
"""Numbers in a tensor above which its values are not kept, whatever it was computed from."""
NEEDS_VALUES = (DataDependentOutputException, DynamicOutputShapeException)
"""What is raised where a shadow is asked for values."""


class Shadows(TorchDispatchMode):
    """Within: results are shadows, but for small ones whose every ingredient has values."""

    def __init__(self) -> None:
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs one operation, on shadows or for real."""
        kwargs = kwargs or {}
        if func is torch.ops.aten.index.Tensor:
            args = (args[0], _as_numbers(args[1]))
        shadowed = any(isinstance(leaf, FakeTensor) for leaf in tree_leaves((args, kwargs)))
        try:
            with self.fake:
                result = func(*args, **kwargs)
        except NEEDS_VALUES:
            if shadowed:
                raise
            return func(*args, **kwargs)
        large = any(isinstance(leaf, Tensor) and leaf.numel() > LARGE for leaf in tree_leaves(result))
        return result if shadowed or large else func(*args, **kwargs)

    def replace(self, module: nn.Module) -> None:
        """Replaces a module's parameters by shadows, and its buffers, which may be asked for values, by zeros."""
        cast: dict[nn.Parameter, nn.Parameter] = {}
        for part in module.modules():
            for name, parameter in part.named_parameters(recurse=False, remove_duplicate=False):
                if parameter not in cast:
                    with self.fake:
                        shadow = torch.empty_like(parameter, device="cpu")
                    cast[parameter] = nn.Parameter(shadow, parameter.requires_grad)
                part._parameters[name] = cast[parameter]
            for name, buffer in part.named_buffers(recurse=False):
                part._buffers[name] = torch.zeros_like(buffer, device="cpu")


def _as_numbers(indices: list[Tensor | None]) -> list[Tensor | None]:
    """Replaces boolean masks that have values by the positions they mark: how many says the shape of the result."""
    numbers: list[Tensor | None] = []
    for index in indices:
        if index is None or index.dtype != torch.bool or isinstance(index, FakeTensor):
            numbers.append(index)
        else:
            numbers += index.nonzero().unbind(1)
    return numbers
