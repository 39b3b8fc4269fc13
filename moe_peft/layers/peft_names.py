"""Hugging Face PEFT's own rules for names: which linears a LoRA adapts, and with which rank, alpha and scale."""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

T = TypeVar("T")


def by_pattern(patterns: Mapping[str, T] | None, default: T, name: str) -> T:
    """Returns a linear's own rank or alpha: that of the first pattern which the end of its name matches.

    Args:
        patterns: values by regular expression (`rank_pattern`, `alpha_pattern`), in their order. An expression begins
            where the name does, or after one of its dots.
        default: where none matches.
        name: the linear's name in the model.
    """
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default


def check_patterns(argument: str, patterns: Iterable[str]) -> None:
    """Refuses a pattern that is no regular expression.

    Raises:
        ValueError: names the argument and the pattern.
    """
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{argument}: {pattern!r} is no regular expression ({error}); correct it") from None


def scale_of(alpha: float, rank: int, rank_stabilised: bool = False) -> float:
    """Returns s: alpha / r, or alpha / sqrt(r) for a rank-stabilised LoRA (arXiv 2312.03732)."""
    return alpha / (math.sqrt(rank) if rank_stabilised else rank)


def targeted(config: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """Returns which modules an adapter_config.json means.

    Args:
        config: its content.
        names: the modules there are.
    """
    return [name for name in names if _is_targeted(config, name)]


def _is_targeted(config: Mapping[str, Any], name: str) -> bool:
    wanted, layers = config.get("target_modules"), config.get("layers_to_transform")
    if _matches(config.get("exclude_modules"), name) or not _matches(wanted, name):
        return False
    if isinstance(wanted, str) or layers is None or layers == [] or name in (wanted or ()):  # a whole name is meant so
        return True
    layer = _layer_of(name, config.get("layers_pattern"))
    return layer is not None and (layer == layers if isinstance(layers, int) else layer in layers)


def _matches(wanted: str | list[str] | None, name: str) -> bool:
    if isinstance(wanted, str):
        return re.fullmatch(wanted, name) is not None
    return any(f".{name}".endswith(f".{end}") for end in wanted or ())


def _layer_of(name: str, patterns: str | list[str] | None) -> int | None:
    """Returns the first number in a name that stands behind one of the patterns, or behind any part but the first."""
    given = [patterns] if isinstance(patterns, str) else patterns
    behind = [rf"(?:^|.*?\.){one}\.(\d+)\." for one in given or () if one] or [r".*?\.[^.]*\.(\d+)\."]
    found = (re.match(expression, name) for expression in behind)
    return next((int(match[1]) for match in found if match), None)
