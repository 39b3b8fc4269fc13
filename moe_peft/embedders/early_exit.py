"""One layer's states without the layers after it, from an unmodified Hugging Face model.

The first pass goes through all layers and shows which block is given those states as they are; later passes are left
where that block begins, by an exception. Where there is no such block (the last layer, blocks used more than once), or
a pass must not be left (sharded or compiled models), all layers run. Either way the states are the same to the bit.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from moe_peft.sharding import is_sharded


class _Reached(Exception):
    """Carries the states out of the pass."""

    def __init__(self, states: Tensor) -> None:
        super().__init__()
        self.states = states


class EarlyExit:
    """Reads `hidden_states[layer]` of one model.

    Args:
        layer: 0 is the embedding output, n the output of the n-th layer, None the last one.
    """

    def __init__(self, layer: int | None) -> None:
        self.layer = layer
        # The block that is given the states, if there is one; None before the first pass.
        self._next: list[nn.Module] | None = None

    def states(self, trunk: nn.Module, **inputs: Any) -> Tensor:
        """Returns the states [B, S, d] of a pass of the trunk, which must be in eval mode, for its forward's inputs."""
        if self.layer is None or not _may_be_left(trunk):
            return self._whole_pass(trunk, inputs)
        if self._next is None:
            return self._search(trunk, inputs)
        try:
            with _before(self._next, _leave):
                return self._whole_pass(trunk, inputs)
        except _Reached as reached:
            return reached.states

    def _search(self, trunk: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """Runs the whole pass and finds the block to stop at."""
        given: dict[nn.Module, Any] = {}
        listed = [block for blocks in trunk.modules() if isinstance(blocks, nn.ModuleList) for block in blocks]
        with _before(listed, given.setdefault):
            states = self._whole_pass(trunk, inputs)
        self._next = [block for block, first in given.items() if first is states][:1]
        return states

    def _whole_pass(self, trunk: nn.Module, inputs: dict[str, Any]) -> Tensor:
        output = trunk(**inputs, output_hidden_states=True)
        return output.hidden_states[-1 if self.layer is None else self.layer]


def _leave(block: nn.Module, states: Tensor) -> None:
    raise _Reached(states)


@contextlib.contextmanager
def _before(blocks: Iterable[nn.Module], act: Callable[[nn.Module, Any], Any]) -> Iterator[None]:
    """Within: `act` is called with a block and its first input before the block runs."""

    def hook(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        act(block, next(iter((*args, *kwargs.values())), None))

    hooks = [block.register_forward_pre_hook(hook, with_kwargs=True) for block in blocks]
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()


def _may_be_left(trunk: nn.Module) -> bool:
    """Whether an exception may cross the pass, and hooks are seen: not where FSDP2 or torch.compile run it."""
    if torch.compiler.is_compiling() or is_sharded(trunk):
        return False
    # A compiled module, or one whose forward was replaced by a compiled one.
    return not any(part._compiled_call_impl is not None or "forward" in vars(part) for part in trunk.modules())
