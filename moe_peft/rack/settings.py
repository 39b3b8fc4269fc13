"""What a comparison is of, as its YAML says it."""

import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml
from jsonargparse import ArgumentParser

from moe_peft.budget import config_file, config_names
from moe_peft.messages import arguments_of

SECTIONS = ("model", "data", "trainer", "checkpoint", "results", "predictions")
"""Sections of a configuration that a comparison may lay over the methods' files."""
ENTRY = ("method", "tag", "sized", *SECTIONS)


class Entry(NamedTuple):
    """A row to be."""

    tag: str
    """Its name in the tables."""
    file: Path
    """The method's YAML."""
    sized: bool
    """Whether the budget decides its size."""
    overlay: dict[str, Any]
    """Configuration of this row alone."""


class LeaveOneOut:
    """Trains on all tasks but one, then tests the one: as it is, and after k examples of it.

    Args:
        shots: k, of every class, or in all where a task has no classes.
        tasks: those that are left out, one after the other; all of them where not given.
        new_row: what a task begins with where tasks have embeddings (see `TransferFrom`).
        overlay: sections of a configuration for the fits on k examples alone, such as fewer steps.
    """

    def __init__(
        self,
        shots: int = 16,
        tasks: list[str] | None = None,
        new_row: Literal["mean", "nearest"] = "mean",
        overlay: dict[str, Any] | None = None,
    ) -> None:
        if shots < 1:
            raise ValueError(f"leave_one_out.shots: {shots} is below 1")
        self.shots, self.tasks, self.new_row = shots, tasks, new_row
        self.overlay = sections(overlay or {}, "leave_one_out.overlay")


class Comparison:
    """Methods on the same base, tasks, training and budget.

    Args:
        base: a YAML, or its name in configs/bases.
        data: a YAML, or its name in configs/data.
        methods: of every row its method: a YAML, or its name in configs/methods. Or a mapping of `method`, and of what
            else shall hold for this row: `tag` (its name in the tables), `sized: false` (the budget does not change
            it), and sections of a configuration (`model`, `data`, `trainer`, ...).
        out: the folder for runs and tables.
        common: sections of a configuration that are laid over every method's file.
        budget: trainable parameters of the adapters that every method gets as few above as its form allows; or a
            method, or a mapping of `method` and `model`, whose size is the budget. Sizes stay as they are without it.
        seeds: of the repetitions; the first one also serves to choose the learning rate.
        learning_rates: from which every method's is chosen, on validation data; the methods' own where not given.
        reference: the tag of the row that all others are compared with; where not given lora, or else the first one.
        leave_one_out: also asks how far methods generalise to a task that they were not trained on.

    Raises:
        ValueError: what cannot be run; one line.
    """

    def __init__(
        self,
        base: str,
        data: str,
        methods: list[str | dict[str, Any]],
        out: str,
        common: dict[str, Any] | None = None,
        budget: int | str | dict[str, Any] | None = None,
        seeds: list[int] | None = None,
        learning_rates: list[float] | None = None,
        reference: str | None = None,
        leave_one_out: LeaveOneOut | None = None,
    ) -> None:
        self.base, self.data = found(base, "bases", "base"), found(data, "data", "data")
        self.common = sections(common or {}, "common")
        if "callbacks" in self.common.get("trainer", {}):
            raise ValueError("common: trainer.callbacks would take the methods' own away; write callbacks+, which adds")
        self.entries = [entry(method) for method in methods]
        tags = [one.tag for one in self.entries]
        refuse_repeated("methods", tags, "a tag of its own")
        refuse_repeated("methods", [slug(tag) for tag in tags], "a tag whose folder has another name")
        self.seeds, self.rates = [0] if seeds is None else seeds, learning_rates
        refuse_repeated("seeds", self.seeds, "every seed once")
        refuse_repeated("learning_rates", self.rates or [], "every rate once")
        for name, values in (
            ("methods", tags),
            ("seeds", self.seeds),
            ("learning_rates", [0] if self.rates is None else self.rates),
        ):
            if not values:
                raise ValueError(f"{name}: the list is empty; name at least one")
        self.budget = budget if budget is None or isinstance(budget, int) else entry(budget)
        if reference is not None and reference not in tags:
            raise ValueError(f"reference: there is no row {reference!r}; use one of {', '.join(tags)}")
        self.reference = reference or ("lora" if "lora" in tags else tags[0])
        self.out, self.leave_one_out = Path(out), leave_one_out


def read_comparison(file: Path) -> Comparison:
    """Reads a comparison's YAML.

    Raises:
        ValueError: no such file, or one that is no comparison.
    """
    if not file.is_file():
        raise ValueError(f"comparison: there is no file '{file}'; see configs/compare")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Comparison, "comparison")
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"comparison: '{file}' is no YAML: {error}") from None
    known = arguments_of(Comparison)
    odd = [key for key in content if key not in known] if isinstance(content, dict) else [content]
    if odd:
        raise ValueError(f"comparison: {odd[0]!r} means nothing; a comparison has {', '.join(known)}")
    checked = parser.parse_object({"comparison": deepcopy(content)}).comparison
    # Sections of configurations stay as they are written: a class path in them is for the fit to read.
    plain = content | {name: checked[name] for name in ("seeds", "learning_rates")}
    if content.get("leave_one_out") is not None:
        plain["leave_one_out"] = LeaveOneOut(**content["leave_one_out"])
    return Comparison(**plain)


def found(name: str, folder: str, argument: str) -> Path:
    """Finds a configuration.

    Raises:
        ValueError: there is none.
    """
    file = config_file(name, folder)
    if file is None:
        raise ValueError(f"{argument}: there is no {name!r}; give a YAML, or one of {config_names(folder)}")
    return file


def entry(given: str | Mapping[str, Any]) -> Entry:
    """Reads one of the methods.

    Raises:
        ValueError: a method that there is not, or a key that means nothing.
    """
    plain = {"method": given} if isinstance(given, str) else dict(given)
    odd = [key for key in plain if key not in ENTRY]
    if odd or "method" not in plain:
        what = f"{odd[0]!r} means nothing" if odd else f"{plain} names no method"
        raise ValueError(f"methods: {what}; a method has {', '.join(ENTRY)}")
    file = found(str(plain["method"]), "methods", "methods")
    overlay = sections({key: plain[key] for key in plain if key in SECTIONS}, "methods")
    sized = plain.get("sized", True)
    if not isinstance(sized, bool):
        raise ValueError(f"methods: sized: {sized!r} is neither true nor false")
    return Entry(str(plain.get("tag", file.stem)), file, sized, overlay)


def sections(given: Mapping[str, Any], argument: str) -> dict[str, Any]:
    """Checks that what is laid over a configuration consists of sections of one.

    Raises:
        ValueError: another key.
    """
    for key, value in given.items():
        if key not in SECTIONS or not isinstance(value, Mapping):
            raise ValueError(
                f"{argument}: {key!r} is no section of a configuration; use {', '.join(SECTIONS)} as in a fit's YAML"
            )
    return dict(given)


def refuse_repeated(argument: str, values: Sequence[object], what: str) -> None:
    """Raises one line if a value is there twice."""
    doubles = [value for at, value in enumerate(values) if value in values[:at]]
    if doubles:
        raise ValueError(f"{argument}: {doubles[0]!r} is there twice; give {what}")


def merged(*parts: Mapping[str, Any]) -> dict[str, Any]:
    """Lays mappings over each other, the last one on top; lists of a key that ends in +, which adds, are all there."""
    whole: dict[str, Any] = {}
    for part in parts:
        for key, value in part.items():
            below = whole.get(key)
            if isinstance(below, Mapping) and isinstance(value, Mapping):
                whole[key] = merged(below, value)
            elif key.endswith("+") and isinstance(below, list) and isinstance(value, list):
                whole[key] = [*below, *value]
            else:
                whole[key] = value
    return whole


def slug(tag: str) -> str:
    """A tag as the name of a folder."""
    return re.sub(r"[^\w.+=-]+", "-", tag).strip("-") or "row"
