"""HydraLoRA (arXiv 2404.19245): one A for all, E heads B, mixed by token.

    y = W0 x + (α / r) Σ_e g_e B_e A x,   g = softmax(W x), or of A x

Paper and official code differ: the paper's router has r inputs, the code's reads x. The official script adapts gate, up
and down projections only (`targets`).
"""

from typing import Any, ClassVar, Literal

from torch import nn

from moe_peft.layers.mixtures import Layout, TokenRouter
from moe_peft.methods.mixture import TokenMixture


class HydraLoRA(TokenMixture):
    """A shared A with several heads B.

    Args:
        router_input: what the router reads: "x" (official code) or "Ax" (paper), there with the adapters' dropout.
        mixture: the arguments of `TokenMixture`.
    """

    layout: ClassVar[Layout] = "tall"
    as_lora = {"experts": 1}

    def __init__(self, router_input: Literal["x", "Ax"] = "x", **mixture: Any) -> None:
        super().__init__(**mixture)
        if router_input not in ("x", "Ax"):
            raise ValueError(f"router_input: {router_input!r} is unknown; use x or Ax")
        self.router_input: Literal["x", "Ax"] = router_input

    def router(self, base: nn.Linear, experts: int, rank: int) -> TokenRouter:
        """A dense softmax over the heads."""
        width = base.in_features if self.router_input == "x" else rank
        return TokenRouter(
            width,
            experts,
            self.layout,
            rank,
            reads=self.router_input,
            traced=self.traced,
            device=base.weight.device,
        )
