"""One vector per row out of a linear's input, to be compared with task embeddings.

Shapes: B batch, S sequence, D width of the input, d width of the embeddings, T tasks.
"""

from functools import cache
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

Representation = Literal["first_token", "mean", "last_token"]


def represent(x: Tensor, mask: Tensor, how: Representation) -> Tensor:
    """Returns a vector per row [B, D] in fp32.

    Args:
        x: [B, S, D], or [B * S, D] as some models hand it to their linears.
        mask: [B, S], 1 (or True) at the tokens that count; at least one per row.
        how: the first counted token (the official MoRE code), their mean, or the last one.
    """
    x = x.reshape(*mask.shape, x.shape[-1])
    if how == "mean":
        weights = (mask / mask.sum(1, keepdim=True)).to(x.dtype)  # a sum of many tokens would overflow half precision
        return (weights.unsqueeze(1) @ x).squeeze(1).float()
    order = torch.arange(1, mask.shape[1] + 1, device=mask.device) * mask
    at = order.argmax(1) if how == "last_token" else mask.to(torch.int64).argmax(1)
    return x[torch.arange(len(x), device=x.device), at].float()


@cache
def _projection(width: int, target: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode(False):  # it is kept, and may be used in training next
        return (torch.randn(width, target, generator=generator) / target**0.5).to(device)


def cosines(h: Tensor, embeddings: Tensor) -> Tensor:
    """Returns the cosine of every row and every task [B, T].

    Args:
        h: [B, D].
        embeddings: [T, d]. Where d is not D (one table shared by linears of any width), h goes through a fixed random
            projection, which keeps cosines on average and trains nothing.
    """
    if h.shape[1] != embeddings.shape[1]:
        h = h @ _projection(h.shape[1], embeddings.shape[1], h.device)
    return functional.normalize(h, dim=-1) @ functional.normalize(embeddings, dim=-1).mT
