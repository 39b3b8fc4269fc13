"""RoAd (arXiv 2409.00119): the output of every linear is cut into pairs, which are rotated and stretched.

    y = R (W0 x + b),   R = 2 x 2 blocks:  y_i = c_i z_i - s_i z_j,  y_j = c_j z_j + s_j z_i,  c = α cos θ, s = α sin θ

It does not fit W0 + B C A: R - 1 has full rank. It is two products by element instead, starts at the identity (θ = 0,
α = 1) and merges into W0 and b. Numerically Hugging Face PEFT's, whose groups of 64 pair element i with i + 32; here a
group is the largest power of two up to 64 that divides O. Beyond the paper, every task may have its own R.
"""

import math
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from moe_peft.layers.factors import Factors
from moe_peft.layers.transformed import TransformedLinear
from moe_peft.methods.transforms import OutputTransform

Variant = Literal["road_1", "road_2", "road_4"]


class Rotations(Factors):
    """Angles θ and stretches α of T tasks; road_1 has one of each per pair, road_2 per element, road_4 two per element.

    Args:
        out_features: O.
        group: an even divisor of O; element i of a group is paired with i + group / 2.
        variant: "road_1", "road_2" or "road_4".
        tasks: T, 1 where all share theirs.
        device: where to create them.
    """

    rank_in = rank_out = 0

    def __init__(
        self, out_features: int, group: int, variant: Variant, tasks: int = 1, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        self.group, self.variant = group, variant
        size = {"road_1": out_features // 2, "road_2": out_features, "road_4": 2 * out_features}[variant]
        self.theta = nn.Parameter(torch.zeros(tasks, size, device=device, dtype=torch.float32))
        self.alpha = nn.Parameter(torch.ones(tasks, size, device=device, dtype=torch.float32))

    def forward(self) -> tuple[Tensor, Tensor]:
        """Returns c and s [T, O]."""
        theta, alpha = self.theta, self.alpha
        if self.variant == "road_4":  # by group: those of c, then those of s
            (t1, t2), (a1, a2) = (
                (part.flatten(1) for part in own.unflatten(1, (-1, 2, self.group)).unbind(2)) for own in (theta, alpha)
            )
            return a1 * t1.cos(), a2 * t2.sin()
        if self.variant == "road_1":
            theta, alpha = (
                own.unflatten(1, (-1, 1, self.group // 2)).expand(-1, -1, 2, -1).flatten(1) for own in (theta, alpha)
            )
        return alpha * theta.cos(), alpha * theta.sin()

    def rotated(self, z: Tensor) -> Tensor:
        """Returns z [..., O] with every pair (z_i, z_j) turned by a right angle, (-z_j, z_i)."""
        first, second = z.unflatten(-1, (-1, 2, self.group // 2)).unbind(-2)
        return torch.stack((-second, first), -2).flatten(-3)


class RoadLinear(TransformedLinear):
    """A frozen linear whose output is rotated in pairs, by a row's own task's angles where there are several tasks'."""

    factors: Rotations

    @property
    def depends_on_task(self) -> bool:
        """Whether tasks have their own angles."""
        return len(self.factors.theta) > 1

    def transform(self, z: Tensor) -> Tensor:
        """Returns R z; products are taken in fp32, because a small angle is lost in fewer digits."""
        c, s = self.of_rows(z) if self.depends_on_task else self.factors()
        return (z * c + self.factors.rotated(z) * s).to(z.dtype)

    def of_rows(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the c and s of each row's task [B, 1, O], with as many dimensions as z."""
        tasks, (c, s) = self.tasks_of(z), self.factors()
        shape = len(z), *(1,) * (z.dim() - 2), -1
        return c[tasks].view(shape), s[tasks].view(shape)

    def transformed(self, z: Tensor, task: int) -> Tensor:
        """Returns R z for a task."""
        c, s = (own[task if self.depends_on_task else 0] for own in self.factors())
        return z * c + self.factors.rotated(z) * s


class RoAd(OutputTransform):
    """Rotations of outputs, for all tasks or by task.

    Args:
        variant: "road_1": an angle and a stretch per pair; "road_2": per element; "road_4": two of each per element.
        group_size: elements that are paired among themselves, an even divisor of every linear's outputs; null takes
            the largest power of two up to 64. It changes which elements meet, not how many parameters there are.
        transform: the arguments of `OutputTransform`.
    """

    sized_by: ClassVar[str] = ""

    def __init__(self, variant: Variant = "road_1", group_size: int | None = None, **transform: Any) -> None:
        super().__init__(**transform)
        if variant not in ("road_1", "road_2", "road_4"):
            raise ValueError(f"variant: {variant!r} is unknown; use road_1, road_2 or road_4")
        self.variant: Variant = variant
        self.group_size = group_size

    def adapt(self, base: nn.Linear, slot: str) -> RoadLinear:
        """Angles and stretches of the outputs."""
        outputs = base.out_features
        group = math.gcd(outputs, 64) if self.group_size is None else self.group_size
        if group < 2 or group % 2 or outputs % group:
            raise ValueError(
                f"group_size: {group} is no even divisor of the {outputs} outputs of {slot}; give one, or leave "
                "that linear out (targets)"
            )
        rotations = Rotations(outputs, group, self.variant, self.copies, base.weight.device)
        return RoadLinear(base, rotations, self.context, slot)
