"""What one linear of a benchmark is: its sizes, its dtype, its batch, and what of it is timed.

Shapes: B rows, S tokens of a row, D features in and out (a square linear).
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from moe_peft.context import RoutingContext

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Setting(NamedTuple):
    """One linear and its batch; adapters are stored in fp32 whatever its dtype."""

    width: int
    """D."""
    rows: int
    """B."""
    tokens: int
    """S."""
    dtype: str
    """"fp32" or "bf16", of the base."""
    training: bool
    """Forward and backward, or a forward without gradients."""
    base: bool = False
    """Whether the base's own product is part of what is timed; else its output is there already."""
    device: str = "cpu"

    @property
    def count(self) -> int:
        """B S, all tokens."""
        return self.rows * self.tokens

    @property
    def job(self) -> str:
        """What is timed, in words."""
        return f"{'forward + backward' if self.training else 'forward'}, {'with the base' if self.base else 'alone'}"

    def check(self) -> None:
        """Refuses what cannot be measured.

        Raises:
            ValueError: a size below 1, another dtype, or a device that is not there.
        """
        for name in ("width", "rows", "tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)} is below 1")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype: {self.dtype!r} is unknown; use {', '.join(DTYPES)}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device: cuda is not available here; use cpu")

    def input(self, seed: int = 0) -> Tensor:
        """Returns random x, or an upstream gradient, [B, S, D]."""
        shape, generator = (self.rows, self.tokens, self.width), torch.Generator().manual_seed(seed)
        return torch.randn(shape, generator=generator).to(self.device, DTYPES[self.dtype])

    def linear(self) -> nn.Linear:
        """Returns a frozen base of its own for one variant."""
        if not self.base:
            return ReadyLinear(self)
        with torch.device(self.device):
            base = nn.Linear(self.width, self.width, bias=False, dtype=DTYPES[self.dtype]).requires_grad_(False)
        draw(base.weight, self.width**-0.5, torch.Generator().manual_seed(1))
        return base

    def begin(self, context: RoutingContext) -> Tensor:
        """Begins the batch; returns its content key."""
        ids = torch.arange(self.rows, device=self.device).view(-1, 1)
        return context.begin(ids, torch.ones_like(ids))


class ReadyLinear(nn.Linear):
    """A frozen linear whose output, zero at first, is there already: the base is the same work in every method.

    Args:
        setting: its sizes.
    """

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting.width, setting.width, bias=False, device=setting.device, dtype=DTYPES[setting.dtype])
        self.requires_grad_(False)
        self.ready = torch.zeros(
            setting.rows, setting.tokens, setting.width, device=setting.device, dtype=self.weight.dtype
        )

    def forward(self, input: Tensor) -> Tensor:
        """Returns the output; as a new tensor on the same memory, since adapters write into it."""
        return self.ready.detach()


@torch.no_grad()
def draw(tensor: Tensor, std: float, generator: torch.Generator) -> Tensor:
    """Sets a tensor to random normal values that do not depend on the device."""
    return tensor.copy_(torch.randn(tensor.shape, generator=generator) * std)
