"""Optimizer groups and the learning-rate schedule.

Trainable parameters form four named groups (adapters, routers, gates, heads) from the first step on, each with its own
learning rate and weight decay; which group a parameter belongs to is decided by where it lives, never by its state.
"""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from moe_peft.layers.routers import Router

GROUPS = ("adapters", "routers", "gates", "heads")
LOWER_THE_RATE = "lower the learning rate"
"""In every error of a run that diverged, which is how a comparison of learning rates knows it from other failures."""


class PerGroup:
    """One optional number per parameter group; None keeps the optimizer's own value.

    Args:
        adapters: factors (A, B, tensor-train cores).
        routers: router weights and projections, rank selectors and task embeddings.
        gates: scalar gates (T-REX's ω and m).
        heads: classifier heads.
    """

    def __init__(
        self,
        adapters: float | None = None,
        routers: float | None = None,
        gates: float | None = None,
        heads: float | None = None,
    ) -> None:
        self.adapters, self.routers, self.gates, self.heads = adapters, routers, gates, heads
        for group in GROUPS:
            value = getattr(self, group)
            if value is not None and value < 0:
                raise ValueError(f"{group}: {value} is negative")


class WeightDecays(PerGroup):
    """Weight decay per parameter group."""


class LearningRates(PerGroup):
    """Learning rate per parameter group; None takes the method's own (`default_rates`), else the optimizer's."""


def trained_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Returns the trainable parameters by name."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def parameter_groups(module: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Sorts a method's trainable parameters into the four groups; empty groups are left out."""
    gates = {
        id(router.get_parameter(name))
        for router in module.modules()
        if isinstance(router, Router)
        for name in router.gate_names
    }
    groups: dict[str, list[nn.Parameter]] = {group: [] for group in GROUPS}
    for name, parameter in trained_parameters(module).items():
        if id(parameter) in gates:
            groups["gates"].append(parameter)
        elif ".factors." in name:
            groups["adapters"].append(parameter)
        elif name.startswith("heads."):
            groups["heads"].append(parameter)
        else:
            groups["routers"].append(parameter)
    return {group: parameters for group, parameters in groups.items() if parameters}


def optimizer_groups(
    module: nn.Module, rates: LearningRates, decays: WeightDecays, defaults: Mapping[str, float]
) -> list[dict]:
    """Returns the optimizer's parameter groups, named, with the rates and decays that were set.

    Args:
        module: whose trainable parameters.
        rates: as the user set them.
        decays: as the user set them.
        defaults: the method's own learning rates, for groups whose rate the user did not set.
    """
    groups = []
    for name, parameters in parameter_groups(module).items():
        rate, decay = getattr(rates, name), getattr(decays, name)
        settings = {"lr": defaults.get(name) if rate is None else rate, "weight_decay": decay}
        group: dict = {"params": parameters, "name": name}
        group |= {setting: value for setting, value in settings.items() if value is not None}
        groups.append(group)
    return groups


class WarmupDecay(LambdaLR):
    """Linear warm-up, then constant, linear or cosine decay to zero at the last step.

    Args:
        optimizer: given by the trainer.
        warmup: steps of warm-up; below 1, a share of all steps.
        decay: shape after warm-up.
        total_steps: optimizer steps of the whole fit; None lets the module fill in the trainer's own estimate.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        warmup: float = 0.05,
        decay: Literal["constant", "linear", "cosine"] = "linear",
        total_steps: int | None = None,
    ) -> None:
        if warmup < 0:
            raise ValueError(f"warmup: {warmup} is negative")
        self.warmup, self.decay, self.total_steps = warmup, decay, total_steps
        self.spans: dict[str, tuple[int, int]] = {}
        """First step and length, in optimizer steps, of groups that do not learn from the first step to the last."""
        super().__init__(optimizer, [partial(self.factor, group=group.get("name")) for group in optimizer.param_groups])

    def factor(self, step: int, group: str | None = None) -> float:
        """Returns the multiple of the base learning rate used at optimizer step `step` (from 0).

        Args:
            step: the step.
            group: name of the parameter group, which may have a span of its own: 0 before and after it.
        """
        first, total = self.spans.get(group or "", (0, self.total_steps or 0))
        step -= first
        if step < 0 or (group in self.spans and step >= total):
            return 0.0
        warmup = self.warmup * total if self.warmup < 1 else self.warmup
        if step < warmup:
            return (step + 1) / (warmup + 1)
        if self.decay == "constant" or total <= warmup:
            return 1.0
        progress = min(1.0, (step - warmup) / (total - warmup))
        return 1 - progress if self.decay == "linear" else 0.5 * (1 + math.cos(math.pi * progress))

    def state_dict(self) -> dict[str, Any]:
        """Returns the position only: shape and length come from the configuration, also in a resumed, longer fit."""
        own = {"warmup", "decay", "total_steps", "spans"}
        return {name: value for name, value in super().state_dict().items() if name not in own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over the position, and applies the factor that this schedule has there."""
        super().load_state_dict(state_dict)
        self._apply()

    def _apply(self) -> None:
        for group, base in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
            group["lr"] = base * self.factor(self.last_epoch, group.get("name"))

    def set_total_steps(self, total_steps: int) -> None:
        """Fills in the length of the fit, unless it was given, and applies the factor of the current step."""
        if self.total_steps is None:
            self.total_steps = total_steps
            self._apply()

    def set_span(self, group: str, first: int, steps: int) -> None:
        """Gives a parameter group a warm-up and a decay of its own, over the steps in which it learns."""
        self.spans[group] = first, steps
        self._apply()
