"""A task's rows: what is filled in, and the checks that keep bad ones out of a run."""

import math
from collections import Counter
from collections.abc import Sequence

from moe_peft.data.tasks import ANSWER_COLUMNS, Row, TaskSpec, repeated, template_fields


def complete(row: Row) -> Row:
    """Fills in the columns that a template may name and derives the target from the label."""
    complete = {"text_pair": "", "keyword": "", **row}
    choices, label = row.get("choices"), row.get("label")
    if "target" not in row and isinstance(choices, list) and isinstance(label, int) and 0 <= label < len(choices):
        complete["target"] = choices[label]
    return complete


def without_answer(spec: TaskSpec, row: Row) -> Row:
    """Fills in what a row that is only predicted may lack."""
    if not spec.has_options:
        return row
    known = {"choices": list(spec.choices)} if spec.kind == "classification" and row.get("choices") is None else {}
    return {**row, "label": row.get("label"), **known}


def words(spec: TaskSpec, row: Row) -> int:
    """Counts the words of a row's prompt and its longest option together."""
    answers = row["choices"] if spec.has_options else [row.get("target") or ""]
    return len(spec.template.format_map(row).split()) + max(len(answer.split()) for answer in answers)


def majority_label(rows: Sequence[Row]) -> int | None:
    """Returns the most frequent label, the smallest of equals; None where there are no rows."""
    counts = Counter(row["label"] for row in rows)
    return min(counts, key=lambda label: (-counts[label], label)) if counts else None


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
