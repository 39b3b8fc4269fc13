"""What a task is: its specification, the schema of its rows, and the checks that keep bad rows out of a run.

A row is a plain dict: `id, text, text_pair, keyword, choices, label, target`; regression rows carry `value` (float)
instead of choices and label, generation rows `target` alone.
"""

import math
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


def check_rows(spec: TaskSpec, rows: Sequence[Row], split: str, labelled: bool = True) -> None:
    """Refuses rows that would train or score something else than what was meant.

    Args:
        spec: The task.
        rows: Its rows of one split.
        split: The split's name, for the message.
        labelled: Whether every row must have its answer; a wrong one is refused all the same.

    Raises:
        ValueError: One line naming the task, the row's id, the value and the fix.
    """
    if not rows:
        raise ValueError(f"task '{spec.name}': split '{split}' has no rows; add some or leave the task out.")
    fields = template_fields(spec.template)
    seen: set[str] = set()
    for row in rows:
        where = f"task '{spec.name}', {split} row '{row.get('id')}'"
        if not row.get("id") or row["id"] in seen:
            raise ValueError(f"{where}: the id is missing or used twice; give every row an id of its own.")
        seen.add(row["id"])
        for field in fields:
            if field not in row:
                raise ValueError(
                    f"{where}: the template names column '{field}', which the row lacks; "
                    f"use one of {', '.join(sorted(row))}."
                )
        if not isinstance(row.get("text"), str) or not row["text"].strip():
            raise ValueError(f"{where}: text {row.get('text')!r} is empty; fill it or drop the row.")
        if spec.has_options:
            _check_choices(spec, row, where)
        if labelled or any(row.get(column) is not None for column in ANSWER_COLUMNS):
            _check_answer(spec, row, where)


def _check_answer(spec: TaskSpec, row: Row, where: str) -> None:
    if spec.kind == "regression":
        value = row.get("value")
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"{where}: value {value!r} is no finite number; correct it or drop the row.")
        return
    if spec.kind == "generation":
        if not isinstance(row.get("target"), str) or not row["target"].strip():
            raise ValueError(f"{where}: target {row.get('target')!r} is empty; fill it or drop the row.")
        return
    choices, label = row["choices"], row.get("label")
    if label is None:
        raise ValueError(f"{where}: the label is missing; add it, or leave out what is to be predicted only.")
    if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < len(choices):
        raise ValueError(f"{where}: label {label!r} is outside its {len(choices)} choices; use 0..{len(choices) - 1}.")
    if row.get("target", choices[label]) != choices[label]:
        raise ValueError(
            f"{where}: target {row['target']!r} is not choices[{label}] = {choices[label]!r}; correct one."
        )


def _check_choices(spec: TaskSpec, row: Row, where: str) -> None:
    choices = row.get("choices")
    if not isinstance(choices, list) or len(choices) < 2:
        raise ValueError(f"{where}: choices {choices!r} are no list of two or more; correct the row.")
    for choice in choices:
        if not isinstance(choice, str) or not choice.strip():
            raise ValueError(f"{where}: option {choice!r} is empty; fill it or drop the row.")
    twice = repeated(choices)
    if twice is not None:
        raise ValueError(f"{where}: two options are equal ({twice!r}); correct the row or set equal_options: drop.")
    if spec.kind == "classification" and tuple(choices) != spec.choices:
        raise ValueError(
            f"{where}: choices {choices} differ from the task's {list(spec.choices)}; "
            "give all rows the same ones or set kind: multiple_choice."
        )


def repeated(choices: Iterable[str]) -> str | None:
    """Finds an option that occurs twice (blanks around it aside)."""
    seen: set[str] = set()
    for choice in choices:
        if choice.strip() in seen:
            return choice.strip()
        seen.add(choice.strip())
    return None
