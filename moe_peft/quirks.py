"""What frozen Hugging Face models need to be told before they are trained through."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu


def contiguous_input(head: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
    """Makes an output head's input contiguous.

    `logits_to_keep` hands the head a slice; on a sliced 3-D input torch copies the whole vocabulary matrix once per row
    (half of a training step on SmolLM2, and gigabytes in evaluation).
    """
    return (args[0].contiguous(),)


def silence_dropout(block: nn.Module) -> None:
    """Zeroes a block's own dropout rates: its training flag is on to recompute, but the frozen base never drops."""
    for name, value in vars(block).items():
        if "drop" in name and isinstance(value, float):
            setattr(block, name, 0.0)


def keep_recordable(model: nn.Module) -> None:
    """Registers what a model can record (hidden states) once more, after `fully_shard` replaced its class.

    transformers looks that up by the class's name, and without it returns no hidden states.
    """
    from transformers import modeling_utils

    modeling_utils._CAN_RECORD_REGISTRY[model] = model._can_record_outputs  # type: ignore[index]


def offload_input(block: nn.Module) -> None:
    """Lets a recomputed block's input wait for backward in the host's memory; masks and positions, which all blocks
    share, stay where they are.
    """
    recompute: Any = block._gradient_checkpointing_func

    def offloaded(*args: Any, **kwargs: Any) -> Any:
        with save_on_cpu(pin_memory=torch.cuda.is_available()):
            return recompute(*args, **kwargs)

    block._gradient_checkpointing_func = offloaded  # type: ignore[assignment]
