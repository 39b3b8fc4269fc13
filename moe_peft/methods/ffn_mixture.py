"""What mixtures of FFN experts share: one routing for all linears of an FFN, plain LoRA in every other linear."""

from functools import cached_property
from typing import Any, ClassVar

from torch import nn

from moe_peft.layers.adapted import AdaptedLinear
from moe_peft.layers.allocation import at_least
from moe_peft.layers.factors import DenseFactors
from moe_peft.layers.ffn_mixtures import FollowRouter, LeadRouter, Role, ffns, roles
from moe_peft.layers.mixtures import top_k as largest
from moe_peft.methods.mixture import TokenMixture

ROUTER_STD = 0.02


class FFNMixture(TokenMixture):
    """Base of mixtures of FFN experts.

    Args:
        top_k: k, experts of a token, whose weights are the softmax over their own scores; at most a layer's number.
        mixture: the arguments of `TokenMixture`; rank and alpha are those of the plain LoRAs too.
    """

    as_lora = {"experts": 1}
    entry: ClassVar[type[AdaptedLinear]] = AdaptedLinear
    """What the first linears of an FFN become."""
    exit: ClassVar[type[AdaptedLinear]] = AdaptedLinear
    """What its last linear becomes."""

    def __init__(self, top_k: int = 2, **mixture: Any) -> None:
        super().__init__(**mixture)
        at_least("top_k", top_k, 1)
        self.top_k = top_k

    @cached_property
    def roles(self) -> dict[str, Role]:
        """What every adapted linear of an FFN is to it."""
        return roles(self.places, self.top_k)

    def assemble(self) -> None:
        """Builds as every method, and refuses FFNs of which some linears only are adapted.

        Raises:
            ValueError: that, or no FFN at all.
        """
        super().assemble()
        linears = [name.removesuffix(".base") for name, part in self.built().named_modules() if type(part) is nn.Linear]
        found = {end: [*starts, end] for end, starts in ffns(linears).items()}
        touched = [own for own in found.values() if any(name in self.adapted for name in own)]
        name = type(self).__name__
        if not touched:
            raise ValueError(
                f"targets: {self.targets!r} adapts no FFN, which are the experts of {name}; use all-linear"
            )
        for own in touched:
            left = [linear for linear in own if linear not in self.adapted]
            if left:
                raise ValueError(
                    f"targets: {', '.join(left)} not adapted with the rest of the FFN; the experts of {name} are whole "
                    "FFNs: adapt all of one's linears or none"
                )

    def adapt(self, base: nn.Linear, slot: str) -> AdaptedLinear:
        """Experts in the linears of an FFN, one LoRA elsewhere."""
        place, role = self.places[slot], self.roles.get(slot)
        experts = 1 if role is None else place.of(self.experts)
        rank, device = place.of(self.rank), base.weight.device
        factors = DenseFactors(base.in_features, base.out_features, experts * rank, experts * rank, device)
        scale = self.scale(experts, rank, place.of(self.alpha))
        if role is None:
            return AdaptedLinear(base, factors, None, scale, self.dropout, self.context, slot)
        if role.leads:
            router = LeadRouter(
                role.choice,
                base.in_features,
                experts,
                self.layout,
                rank,
                largest(self.top_k),
                std=ROUTER_STD,
                traced=self.traced,
                device=device,
            )
        else:
            router = FollowRouter(role.choice, role.exits, self.layout, rank)
        kind = self.exit if role.exits else self.entry
        return kind(base, factors, router, scale, self.dropout, self.context, slot)
