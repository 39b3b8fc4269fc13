"""LoRA (arXiv 2106.09685), shared over all tasks: the baseline every mixture must beat, through the same path.

y = W0 x + (α / r) B A x
"""

import logging
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn

from moe_peft.layers.adapted import AdaptedLinear
from moe_peft.layers.allocation import at_least
from moe_peft.layers.factors import DenseFactors
from moe_peft.layers.peft_names import by_pattern, check_patterns, scale_of
from moe_peft.methods.base import MultitaskModule

log = logging.getLogger(__name__)


class Imported(NamedTuple):
    """What a LoRA out of Hugging Face PEFT's files knows of them, so that an export gives them back."""

    config: dict[str, Any]
    """Of adapter_config.json, with what only PEFT knows."""
    dtype: torch.dtype
    """Of the tensors in the file; here they are fp32."""


class LoRA(MultitaskModule):
    """One low-rank adapter for all tasks; numerically HF PEFT's LoRA.

    Args:
        rank: r; a list gives layers their own from the first to the last ([4, 8]: half of them each).
        alpha: α; the update is scaled by α / r; or a list likewise.
        dropout: on the adapter's input.
        rank_pattern: other ranks by regular expression over linears' names, as in PEFT: the first one counts that the
            end of a name matches, e.g. {"down_proj": 16, ".*layers.0.*": 4}.
        alpha_pattern: other values of α, likewise.
        use_rslora: scale by α / √r instead (rank-stabilised LoRA, arXiv 2312.03732).
        common: the arguments of `MultitaskModule`.
    """

    scaled_by_rank: ClassVar[bool] = True
    imported: Imported | None = None
    """Of a LoRA that PEFT wrote (see `interop.lora_module`)."""

    def __init__(
        self,
        rank: int | list[int] = 8,
        alpha: float | list[float] = 16.0,
        dropout: float = 0.0,
        rank_pattern: dict[str, int] | None = None,
        alpha_pattern: dict[str, float] | None = None,
        use_rslora: bool = False,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        check_patterns("rank_pattern", rank_pattern or ())
        check_patterns("alpha_pattern", alpha_pattern or ())
        for own in (rank, *(rank_pattern or {}).values()):
            at_least("rank", own, 1)
        if alpha == []:
            raise ValueError("alpha: the list is empty; give a number, or one for each part of the layers")
        self.rank, self.alpha, self.dropout = rank, alpha, dropout
        self.rank_pattern, self.alpha_pattern, self.use_rslora = rank_pattern, alpha_pattern, use_rslora

    @classmethod
    def resized(cls, arguments: Mapping[str, Any], size: int | list[int]) -> dict[str, Any]:
        """As every method; rank-stabilised LoRA keeps its α, which is what α / √r is for.

        Raises:
            ValueError: ranks or alphas that patterns give, which one size does not reach.
        """
        for name in ("rank_pattern", "alpha_pattern"):
            if arguments[name]:
                raise ValueError(f"{name}: {arguments[name]} would stay as it is at another rank; leave it out")
        return {"rank": size} if arguments["use_rslora"] else super().resized(arguments, size)

    def assemble(self) -> None:
        """Builds as every method, and warns of patterns that mean no linear."""
        super().assemble()
        for name, patterns in (("rank_pattern", self.rank_pattern), ("alpha_pattern", self.alpha_pattern)):
            for pattern in patterns or ():
                if not any(by_pattern({pattern: True}, False, slot) for slot in self.adapted):
                    log.warning("%s: %r matches none of the adapted linears", name, pattern)

    def adapt(self, base: nn.Linear, slot: str) -> AdaptedLinear:
        """Dense factors of one rank, no router."""
        place = self.places[slot]
        rank = by_pattern(self.rank_pattern, place.of(self.rank), slot)
        alpha = by_pattern(self.alpha_pattern, place.of(self.alpha), slot)
        factors = DenseFactors(base.in_features, base.out_features, rank, rank, base.weight.device)
        scale = scale_of(alpha, rank, self.use_rslora)
        return AdaptedLinear(base, factors, None, scale, self.dropout, self.context, slot)
