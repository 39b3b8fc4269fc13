"""Which texts share a pass through a model, so that a text's vector does not depend on the batch it came in.

Rounding follows a pass's shape, because the shape decides how a product is cut to pieces; it does not follow what the
other rows hold (measured on a CPU, in fp32 and bf16). So every pass has a shape that a text's own length decides. On a
CPU each text goes by itself, which costs less than padding does; elsewhere texts of similar length go together.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence


class Shape(NamedTuple):
    """Of all passes on a kind of device."""

    rows: int
    step: int
    """Widths are its multiples."""


ON_CPU = Shape(1, 1)
ELSEWHERE = Shape(8, 32)


def shape_on(device: torch.device) -> Shape:
    """Returns the shape of passes on a device."""
    return ON_CPU if device.type == "cpu" else ELSEWHERE


def passes(lengths: Sequence[int], shape: Shape) -> Iterator[list[int]]:
    """Yields the texts of each pass, by index, all of them as wide when `padded`.

    Every pass has `shape.rows` texts: where there are fewer, the last one is repeated.
    """
    widths = [_width(length, shape.step) for length in lengths]
    order = sorted(range(len(widths)), key=widths.__getitem__)
    for _, group in itertools.groupby(order, key=widths.__getitem__):
        alike = list(group)
        for start in range(0, len(alike), shape.rows):
            texts = alike[start : start + shape.rows]
            yield texts + texts[-1:] * (shape.rows - len(texts))


def padded(texts: Sequence[Tensor], step: int, value: int = 0) -> tuple[Tensor, Tensor]:
    """Pads token ids [tokens] on the right, to the next multiple of `step`.

    Returns:
        input_ids [B, S], and a mask [B, S] bool, True for real tokens.
    """
    input_ids = pad_sequence(list(texts), batch_first=True, padding_value=value)
    longest = input_ids.shape[1]
    input_ids = functional.pad(input_ids, (0, _width(longest, step) - longest), value=value)
    lengths = torch.tensor([len(text) for text in texts], device=input_ids.device)
    return input_ids, torch.arange(input_ids.shape[1], device=input_ids.device) < lengths[:, None]


def _width(length: int, step: int) -> int:
    return -(-length // step) * step
