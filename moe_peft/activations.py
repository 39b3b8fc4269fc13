"""What a training step keeps for its backward, in bytes, from a module without weights.

The method's own forward and loss run on shadows (see `moe_peft.shadows`), under saved-tensor hooks; parameters and
buffers do not count, every storage counts once. So what is counted is what autograd saves on a CPU, to the byte. A GPU
saves as much as long as it takes a fused attention kernel too (flash or memory-efficient, for "sdpa"); "eager" keeps
all attention weights on either.

Left out: loss terms of callbacks, and what lives within one operation only (fp32 copies, gradients of activations).
"""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves
from transformers.modeling_layers import GradientCheckpointingLayer

from moe_peft.batch import Batch
from moe_peft.data.collate import Collator
from moe_peft.data.encoding import EncodedRow
from moe_peft.methods.base import MultitaskModule
from moe_peft.shadows import NEEDS_VALUES, Shadows

Storages = dict[int, torch.UntypedStorage]


class Load(NamedTuple):
    """What one rank processes at once."""

    rows: int
    """Rows of a micro-batch."""
    tokens: int
    """Of its longest row: prompt and answer for a decoder, else the prompt."""
    answer_tokens: int
    """Of every row's answer."""


class Activations(NamedTuple):
    """Bytes at their peak."""

    plain: int
    checkpointed: int
    """Every block's input, and what one block saves when it is computed again."""


def activation_bytes(
    module: MultitaskModule, load: Load, autocast: torch.dtype | None = None, offloaded: bool = False
) -> Activations:
    """Counts what a step of all parameter groups keeps for its backward.

    Args:
        module: built on the meta device, without gradient checkpointing: one plain forward tells both peaks. Its
            parameters become shadows, so that it is of no other use afterwards.
        load: one rank's micro-batch.
        autocast: dtype of the trainer's mixed precision, if any.
        offloaded: whether the inputs of recomputed blocks wait in the host's memory.

    Raises:
        ValueError: the base's forward asks for values that a shadow does not have.
    """
    shadows = Shadows()
    shadows.replace(module.train())
    know_the_prompts(module, load.rows)
    batch = longest_batch(module, load)
    try:
        with (
            shadows,
            torch.autocast("cpu", autocast, enabled=autocast is not None),
            _watched(module, offloaded) as spans,
        ):
            module.begin(batch)
            module.step_losses(batch)
    except NEEDS_VALUES:
        raise ValueError(
            f"backbone {module.backbone.name!r}: what its forward keeps depends on numbers, not on shapes alone, so "
            "that it cannot be planned; measure a short run instead"
        ) from None
    return _peaks(spans)


def longest_batch(module: MultitaskModule, load: Load) -> Batch:
    """Returns a batch whose first row is full and whose others lack one token, so that attention needs its mask."""
    kind = module.backbone.kind
    answer = [1] * load.answer_tokens
    longest = load.tokens - (load.answer_tokens if kind == "causal" else 0)
    rows = [
        EncodedRow(f"row{at}", at % len(module.specs), {}, "", [1] * (longest - (at > 0)), answer, [], 0, 0)
        for at in range(load.rows)
    ]
    return Collator(kind, pad_id=0).train(rows, 1.0, 1.0, [1.0] * load.rows)


def know_the_prompts(module: MultitaskModule, rows: int) -> None:
    """Stands in for a fitted reader of prompts: reading has no gradient, so nothing of it is kept."""
    embedder = module.embedder
    if embedder is not None:
        vectors = torch.zeros(rows, len(embedder.center))
        embedder.raw = lambda batch: vectors
        embedder.fitted.fill_(True)
    if module.prior is not None:
        module.prior.fitted.fill_(True)


class _Span(NamedTuple):
    """A stretch of the forward: one block, or what lies between two of them."""

    inputs: Storages | None
    """What a recomputed block starts from; None between blocks."""
    saved: Storages


@contextlib.contextmanager
def _watched(module: MultitaskModule, offloaded: bool) -> Iterator[list[_Span]]:
    """Within: a forward leaves what it saves in the list that is given, span by span."""
    spans = [_Span(None, {})]
    owned = _storages((*module.parameters(), *module.buffers()))

    def enter(block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        # Only what is given by position goes to the host.
        spans.append(_Span(_storages(tree_leaves(kwargs if offloaded else (args, kwargs))), {}))

    def leave(*_: Any) -> None:
        spans.append(_Span(None, {}))

    def pack(tensor: Tensor) -> Tensor:
        spans[-1].saved.update({key: own for key, own in _storages([tensor]).items() if key not in owned})
        return tensor

    with contextlib.ExitStack() as stack:
        for block in module.built().modules():
            if isinstance(block, GradientCheckpointingLayer):
                stack.callback(block.register_forward_pre_hook(enter, with_kwargs=True).remove)
                stack.callback(block.register_forward_hook(leave).remove)
        stack.enter_context(saved_tensors_hooks(pack, lambda tensor: tensor))
        yield spans


def _peaks(spans: list[_Span]) -> Activations:
    """Finds both peaks: a recomputed block stands on all that was kept up to its end, the later ones are done with."""
    everything: Storages = {}
    kept: Storages = {}
    peak = 0
    for span in spans:
        everything |= span.saved
        kept |= span.saved if span.inputs is None else span.inputs
        peak = max(peak, _bytes(kept | span.saved))
    return Activations(_bytes(everything), peak)


def _storages(leaves: Iterable[Any]) -> Storages:
    """Returns the storages of tensors; holding them keeps their keys from being given out again."""
    found = [leaf.untyped_storage() for leaf in leaves if isinstance(leaf, Tensor)]
    return {storage._cdata: storage for storage in found}


def _bytes(storages: Storages) -> int:
    return sum(storage.nbytes() for storage in storages.values())
