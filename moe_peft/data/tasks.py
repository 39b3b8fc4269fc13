"""What a task is: its name, its specification and the schema of its rows.

A row is a plain dict: `id, text, text_pair, keyword, choices, label, target`; regression rows carry `value` (float)
instead of choices and label, generation rows `target` alone.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from string import Formatter
from typing import Any, Literal

Kind = Literal["classification", "multiple_choice", "regression", "generation"]
Split = Literal["train", "validation", "test"]
Row = dict[str, Any]

ANSWER_COLUMNS = ("target", "label", "value")
"""Columns that hold a row's answer, or lead to it."""
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
METRICS: dict[Kind, tuple[str, ...]] = {
    "classification": ("accuracy", "matthews", "f1", "macro_f1"),
    "multiple_choice": ("accuracy",),
    "regression": ("pearson", "spearman"),
    "generation": ("exact_match", "token_f1"),
}
"""Metric names that fit a kind; `a/b` reports both and `a` is the primary one."""
TAKEN_NAMES = {"mean": "the mean of all tasks in tables", "router": "the router among a run's metrics"}
"""What no task may be called, and why."""


@dataclass(frozen=True)
class TaskSpec:
    """What a method and a metric need to know of a task without reading its rows.

    Args:
        name: The task's name, unique in a run; the first part of its row ids.
        kind: What an answer is.
        metric: One of `METRICS[kind]`, or two joined by a slash of which the first is the primary one.
        template: The prompt, with a row's columns in braces (`Question: {text}`).
        choices: The label names of a classification task, () for the other kinds.

    Raises:
        ValueError: An unknown kind or metric, or a classification task without two different label names.
    """

    name: str
    kind: Kind
    metric: str
    template: str
    choices: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuses what no run could use."""
        if self.kind not in METRICS:
            raise ValueError(f"task '{self.name}': kind '{self.kind}' is unknown; use one of {', '.join(METRICS)}.")
        for metric in self.metric.split("/"):
            if metric not in METRICS[self.kind]:
                raise ValueError(
                    f"task '{self.name}': metric '{self.metric}' does not fit kind '{self.kind}'; "
                    f"use {' or '.join(METRICS[self.kind])} (two of them: 'a/b')."
                )
        if self.kind == "classification":
            if len(self.choices) < 2:
                raise ValueError(f"task '{self.name}': choices {list(self.choices)} are too few; name two labels.")
            twice = repeated(self.choices)
            if twice is not None:
                raise ValueError(f"task '{self.name}': two labels are equal ({twice!r}); rename one of them.")

    @classmethod
    def from_saved(cls, fields: Mapping[str, Any]) -> "TaskSpec":
        """Returns a specification out of its fields as plain types, in which a checkpoint keeps it."""
        return cls(**{**fields, "choices": tuple(fields["choices"])})

    @property
    def primary_metric(self) -> str:
        """The metric that enters the mean over tasks."""
        return self.metric.split("/")[0]

    @property
    def has_options(self) -> bool:
        """Whether an answer is one of a row's choices (scored by likelihood) rather than free text or a number."""
        return self.kind in ("classification", "multiple_choice")


def template_fields(template: str) -> list[str]:
    """Lists the columns that a template names, in order of appearance.

    Raises:
        ValueError: An unbalanced brace, a field that is no plain column name, or one that holds the answer.
    """
    try:
        fields = [field for _, field, _, _ in Formatter().parse(template) if field is not None]
    except ValueError as error:
        raise ValueError(f"template {template!r} is malformed ({error}); write a literal brace as '{{{{'.") from None
    for field in fields:
        if not field.isidentifier():
            raise ValueError(f"template {template!r} has the field {{{field}}}; name a column, such as {{text}}.")
        if field in ANSWER_COLUMNS:
            raise ValueError(f"template {template!r} gives the answer away by {{{field}}}; take it out of the prompt.")
    return fields


def repeated(choices: Iterable[str]) -> str | None:
    """Finds an option that occurs twice (blanks around it aside)."""
    seen: set[str] = set()
    for choice in choices:
        if choice.strip() in seen:
            return choice.strip()
        seen.add(choice.strip())
    return None


def refuse_names(names: Sequence[str], what: str) -> None:
    """Raises one line if a name is there twice, or is one of `TAKEN_NAMES`."""
    for name in names:
        if name in TAKEN_NAMES:
            raise ValueError(f"{what} a task called '{name}', which stands for {TAKEN_NAMES[name]}; rename it.")
    name, count = Counter(names).most_common(1)[0] if names else ("", 0)
    if count > 1:
        raise ValueError(f"{what} {count} tasks called '{name}'; names must be unique, rename or drop one.")
