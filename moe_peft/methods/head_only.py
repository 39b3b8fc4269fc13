"""Heads alone: a frozen classifier backbone with a trained head per task, no adapters (linear probing).

    logits = W_t pool(base(x)) + b_t

What every adapter must beat to be worth its parameters; the counterpart in Hugging Face PEFT is none at all.
"""

from typing import Any, ClassVar

from torch import nn

from moe_peft.backbones import Kind
from moe_peft.methods.base import MultitaskModule


class HeadOnly(MultitaskModule):
    """Nothing but the tasks' heads.

    Args:
        common: the arguments of `MultitaskModule`, of which `targets` and `kernels` have nothing to act on.
    """

    sized_by: ClassVar[str] = ""
    kinds: ClassVar[tuple[Kind, ...]] = ("classifier",)

    def __init__(self, **common: Any) -> None:
        super().__init__(**common)
        if not self.train_heads:
            raise ValueError("train_heads: false leaves HeadOnly nothing to train; leave it out")

    def slots(self, model: nn.Module) -> list[str]:
        """Names no linear."""
        return []
