"""Equal budgets: the size at which a method's adapters have as many trainable parameters as another's, and not fewer.

What is counted are the trainable parameters of the adapters: factors, routers, gates, task embeddings, projections of a
prior. Classifier heads are left out: every method has the same ones. Everything is built on the meta device.
"""

import heapq
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from fractions import Fraction
from functools import cache
from importlib import import_module
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from jsonargparse import Namespace

from moe_peft.counting import build_on_meta, count_parameters, model_parser

CONFIGS = Path(__file__).parents[1] / "configs"
"""Where the shipped configurations lie in a checkout."""
REFUSALS = 16
"""Sizes that a method may refuse in a row (where its rank must be a multiple of something, say)."""
LARGEST = 2**20
Size = int | list[int]


class Form(NamedTuple):
    """A method at one size."""

    arguments: dict[str, Any]
    """Of the method, that make the size; none for a method that has one size only."""
    parameters: int
    """Trainable ones of the adapters."""
    heads: int


class Fitted(NamedTuple):
    """A method at the size that a budget gives it."""

    method: str
    form: Form
    budget: int

    @property
    def above(self) -> int:
        """Parameters above the budget."""
        return self.form.parameters - self.budget

    def __str__(self) -> str:
        """Says what was found in a line."""
        share = 100 * self.above / self.budget
        return (
            f"{self.method}: {self.form.parameters:,} adapter parameters, {self.above:,} ({share:.2f} %) above "
            f"{self.budget:,}; heads beside them: {self.form.heads:,}"
        )


class Forms:
    """The forms of a method from the smallest on, built and counted where they are asked for.

    A list of sizes by layer is scaled by one factor and rounded, and no layer falls below 1; the forms are all the
    lists that come about so.

    Args:
        config: a parsed configuration.
        tasks: number of tasks.

    Raises:
        ValueError: the method's size in it is none.
    """

    def __init__(self, config: Namespace, tasks: int) -> None:
        self.config, self.tasks = config, tasks
        self.method: Any = class_of(config.model.class_path)
        self.argument: str = self.method.sized_by
        self.start = config.model.init_args[self.argument] if self.argument else 1
        values = self.start if isinstance(self.start, list) else [self.start]
        if not values or not all(isinstance(value, int) and value > 0 for value in values):
            raise ValueError(
                f"{self.argument}: {self.start} is no size to begin with; give a whole number, or a list of them"
            )
        self._factors = scales(set(values))
        self._known: list[Fraction] = []
        self.at = cache(self._at)

    def size(self, index: int) -> Size:
        """Returns the size number `index`, from 1."""
        if not isinstance(self.start, list):
            return index
        while len(self._known) < index:
            self._known.append(next(self._factors))
        return [max(1, int(value * self._known[index - 1] + Fraction(1, 2))) for value in self.start]

    def _at(self, index: int) -> Form | None:
        """Returns the first form from a size on that the method accepts; None where it refuses many in a row."""
        refusal = None
        for place in range(index, index + REFUSALS):
            config = self.config.clone()
            try:
                resized = self.method.resized(config.model.init_args, self.size(place)) if self.argument else {}
                for name, value in resized.items():
                    config.model.init_args[name] = value
                counts = count_parameters(build_on_meta(config, self.tasks))
            except ValueError as error:
                refusal = refusal or error
                continue
            return Form(resized, counts["trainable"] - counts["heads"], counts["heads"])
        if index == 1 and refusal is not None:  # no matter of size, then
            raise refusal
        return None

    def nearest(self, parameters: int) -> Form | None:
        """Returns the smallest form of at least so many parameters; None where there is none."""

        def enough(index: int) -> bool:
            form = self.at(index)
            return form is None or form.parameters >= parameters

        high = 1
        while not enough(high) and self.argument and high < LARGEST:
            high *= 2
        return self.at(bisect_left(range(high + 1), True, lo=high // 2 + 1, key=enough)) if enough(high) else None


def scales(values: set[int]) -> Iterator[Fraction]:
    """Yields, in order, the factors at which the rounded multiple of one of the values becomes another number."""
    yield Fraction(0)
    last = Fraction(0)
    for factor in heapq.merge(*map(steps, values)):
        if factor > last:
            yield factor
            last = factor


def steps(value: int) -> Iterator[Fraction]:
    """Yields the factors at which the rounded multiple of a value becomes 2, 3, 4, ..."""
    return (Fraction(2 * number - 1, 2 * value) for number in count(2))


def class_of(path: str) -> Any:
    """Returns the class of a parsed configuration's full `class_path`."""
    module, _, name = path.rpartition(".")
    return getattr(import_module(module), name)


def config_file(name: str, folder: str) -> Path | None:
    """Finds a configuration that is named by its path, or as one of configs/<folder> without its ending."""
    places = [Path(name), *(root / folder / f"{name}.yaml" for root in (Path("configs"), CONFIGS))]
    return next((place for place in places if place.is_file()), None)


def config_names(folder: str) -> str:
    """Names the configurations of a folder of configs, for an error."""
    return ", ".join(
        sorted({file.stem for root in (Path("configs"), CONFIGS) for file in (root / folder).glob("*.yaml")})
    )


def method_arguments(method: str, base: str) -> list[str]:
    """Returns the command line that a method on a base means.

    Args:
        method: a YAML, its name in configs/methods, or a class.
        base: a YAML, or its name in configs/bases.

    Raises:
        ValueError: there is no such file.
    """
    own, below = config_file(method, "methods"), config_file(base, "bases")
    if below is None:
        raise ValueError(f"base: there is no {base!r}; give a YAML, or one of {config_names('bases')}")
    if own is None and method.endswith((".yaml", ".yml")):
        raise ValueError(f"method: there is no {method!r}; give a YAML, a class, or one of {config_names('methods')}")
    named = ["--model", method] if own is None else ["--config", str(own)]
    return ["--config", str(below), *named]


def parse_model(arguments: Sequence[str]) -> Namespace:
    """Parses the `model` section of a command line (see `method_arguments`)."""
    return model_parser().parse_args(list(arguments))


def fit_budget(config: Namespace, parameters: int, tasks: int) -> Fitted:
    """Finds the size with which a method's adapters are nearest to a budget without going under.

    Args:
        config: with a parsed `model` section; left as it is.
        parameters: the budget.
        tasks: number of tasks.

    Raises:
        ValueError: a budget below the method's smallest form, or above its largest.
    """
    for name, value in (("parameters", parameters), ("tasks", tasks)):
        if value < 1:
            raise ValueError(f"{name}: {value} is below 1")
    forms = Forms(config, tasks)
    smallest, found = forms.at(1), forms.nearest(parameters)
    assert smallest is not None
    name, argument = forms.method.__name__, forms.argument
    sized = f" ({argument} {smallest.arguments[argument]})" if argument else ""
    if smallest.parameters > parameters:
        raise ValueError(
            f"parameters: {parameters:,} is below the smallest form of {name}, {smallest.parameters:,}{sized}; give at "
            "least as many, adapt fewer linears (model.targets), or change its other arguments"
        )
    if found is None:
        what = f"no {argument} gives it as many" if argument else "it has one size"
        raise ValueError(
            f"parameters: {parameters:,} are more than {name} can have ({what}); give fewer, or leave it as it is"
        )
    return Fitted(name, found, parameters)


def overlay(arguments: Sequence[str], fitted: Fitted, more: Sequence[str] = ()) -> str:
    """Writes what was found as a configuration to lay over the method's own file and the base's.

    Args:
        arguments: of the command line (see `method_arguments`).
        fitted: what was found for them and `more`.
        more: further arguments of the command line, which the overlay takes up.
    """
    plain, changed = (parse_model([*arguments, *extra]).model.as_dict()["init_args"] for extra in ((), more))
    own = {name: value for name, value in changed.items() if value != plain.get(name)} | fitted.form.arguments
    head = f"# {fitted}.\n# Lay it over: {' '.join(arguments)}\n"
    return head + yaml.safe_dump({"model": {"class_path": fitted.method, "init_args": own}}, sort_keys=False)


def adapter_parameters(config: Namespace, tasks: int) -> int:
    """Counts the trainable parameters of the adapters.

    Args:
        config: with a parsed `model` section; left as it is.
        tasks: number of tasks.
    """
    counts = count_parameters(build_on_meta(config.clone(), tasks))
    return counts["trainable"] - counts["heads"]
