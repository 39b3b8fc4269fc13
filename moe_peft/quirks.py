"""What frozen Hugging Face models need to be told before they are trained through."""

from torch import Tensor, nn


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
