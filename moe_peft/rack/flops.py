"""Floating-point operations of a forward, counted on shadows of a module: no weights, no data."""

from typing import NamedTuple

from torch.utils.flop_counter import FlopCounterMode

from moe_peft.activations import Load, know_the_prompts, longest_batch
from moe_peft.benchmark.figures import IN_PLACE
from moe_peft.methods.base import MultitaskModule
from moe_peft.shadows import NEEDS_VALUES, Shadows

LOAD = Load(rows=8, tokens=64, answer_tokens=1)


class Flops(NamedTuple):
    """Per token of a forward in training, loss included; what reads prompts once per text is left out."""

    base: int
    adapters: int
    """What the adapted linears, and all else that the method does, take on top."""


def forward_flops(module: MultitaskModule) -> Flops | None:
    """Counts a forward over rows of 64 tokens; None for a method that asks for values on the way.

    Args:
        module: built on the meta device; of no other use afterwards.
    """
    shadows = Shadows()
    shadows.replace(module.train())
    know_the_prompts(module, LOAD.rows)
    batch = longest_batch(module, LOAD)

    def count() -> int:
        with shadows, FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter:
            module.begin(batch)
            module.row_losses(batch)
        return counter.get_total_flops()

    try:
        whole = count()
        with module.context.disabled():
            bare = count()
    except NEEDS_VALUES:
        return None
    tokens = LOAD.rows * LOAD.tokens
    return Flops(bare // tokens, (whole - bare) // tokens)
