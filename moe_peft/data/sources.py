"""Where tasks come from: the base class of all sources, and the task folder.

A source gives a cheap `spec()` (nothing but names is read) and validated `rows(split)`. Add a source by subclassing
`TaskSource` with `_read_spec` and `_read_rows`; its constructor is its YAML schema.
"""

import gzip
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, cast

from moe_peft.data.splits import subset
from moe_peft.data.tasks import SPLITS, Kind, Row, Split, TaskSpec, check_rows, repeated


class TaskSource:
    """A task's rows, wherever they lie.

    Args:
        train_rows: At most so many training rows, a fixed random subset seeded by the task's name; None takes all.
        validation_rows: The same for validation.
        test_rows: The same for test.
        max_words: Leaves out rows with more words in prompt and longest option together, in every split. Counted in
            words, so that the rows do not depend on a tokenizer.
        template: Replaces the source's own prompt template.
        metric: Replaces the source's own metric.
        equal_options: What becomes of a row with two equal options: an error, or the row is left out.

    Raises:
        ValueError: A limit below 1.
    """

    def __init__(
        self,
        train_rows: int | None = None,
        validation_rows: int | None = None,
        test_rows: int | None = None,
        max_words: int | None = None,
        template: str | None = None,
        metric: str | None = None,
        equal_options: Literal["error", "drop"] = "error",
    ) -> None:
        limits = {"train_rows": train_rows, "validation_rows": validation_rows, "test_rows": test_rows}
        for argument, value in {**limits, "max_words": max_words}.items():
            if value is not None and value < 1:
                raise ValueError(f"{argument}={value} leaves no rows; use 1 or more, or null for all.")
        self._limits = dict(zip(SPLITS, limits.values(), strict=True))
        self._max_words = max_words
        self._template = template
        self._metric = metric
        self._drop_equal = equal_options == "drop"
        self._spec: TaskSpec | None = None
        self._rows: dict[tuple[Split, bool], list[Row]] = {}

    @property
    def note(self) -> str:
        """What a table must say of this task's rows, such as "cut from dev"."""
        return ""

    def spec(self) -> TaskSpec:
        """Gives the task's specification; reads names only, once."""
        if self._spec is None:
            spec = self._read_spec()
            self._spec = TaskSpec(
                spec.name, spec.kind, self._metric or spec.metric, self._template or spec.template, spec.choices
            )
        return self._spec

    def require(self, splits: Sequence[Split]) -> None:
        """Refuses, before any row is read, a source that lacks one of the splits; override it where that can be."""

    def rows(self, split: Split, labelled: bool = True) -> list[Row]:
        """Gives the rows of a split: complete, checked and limited; read once.

        Args:
            split: The split.
            labelled: Whether every row must have its answer. Without: a row may lack label, target and value (its
                label is None then), and a classification row takes the task's choices where it has none.

        Raises:
            ValueError: A bad row or a missing split, in one line.
        """
        if (split, labelled) not in self._rows:
            spec = self.spec()
            rows = [_complete(row) for row in self._read_rows(split)]
            if not labelled:
                rows = [_without_answer(spec, row) for row in rows]
            if self._drop_equal:
                rows = [row for row in rows if repeated(row.get("choices") or ()) is None]
            check_rows(spec, rows, split, labelled)
            if self._max_words is not None:
                rows = [row for row in rows if _words(spec, row) <= self._max_words]
                if not rows:
                    raise ValueError(
                        f"task '{spec.name}': max_words={self._max_words} leaves no {split} rows; raise it."
                    )
            self._rows[split, labelled] = subset(rows, self._limits[split], spec.name, split)
        return self._rows[split, labelled]

    def _read_spec(self) -> TaskSpec:
        raise NotImplementedError

    def _read_rows(self, split: Split) -> list[Row]:
        raise NotImplementedError


class TaskFolder(TaskSource):
    """A folder with `task.json` and `train|validation|test.jsonl[.gz]`.

    `task.json` holds name, kind, metric and template; the label names of a classification task are its `choices`, or
    the choices of the first row where it has none. Prediction needs the file of its split alone.

    Args:
        path: The folder.
        train_rows: At most so many training rows (a fixed random subset).
        validation_rows: The same for validation.
        test_rows: The same for test.
        max_words: Leaves out rows with more words in prompt and longest option together.
        template: Replaces the folder's template.
        metric: Replaces the folder's metric.
        equal_options: What becomes of a row with two equal options: an error, or the row is left out.
    """

    def __init__(
        self,
        path: str,
        train_rows: int | None = None,
        validation_rows: int | None = None,
        test_rows: int | None = None,
        max_words: int | None = None,
        template: str | None = None,
        metric: str | None = None,
        equal_options: Literal["error", "drop"] = "error",
    ) -> None:
        super().__init__(train_rows, validation_rows, test_rows, max_words, template, metric, equal_options)
        self.path = Path(path).expanduser()

    def _read_spec(self) -> TaskSpec:
        if not self.path.is_dir():
            raise ValueError(f"task folder '{self.path}' does not exist; give a folder with task.json and jsonl files.")
        description = self._read_description()
        choices = self._label_names(description) if description["kind"] == "classification" else ()
        return TaskSpec(
            description["name"],
            cast(Kind, description["kind"]),
            self._metric or description["metric"],
            self._template or description["template"],
            choices,
        )

    def require(self, splits: Sequence[Split]) -> None:
        """Looks for the splits' files."""
        for split in splits:
            self._file(split)

    def _label_names(self, description: dict[str, Any]) -> tuple[str, ...]:
        if "choices" in description:
            return tuple(description["choices"])
        present = next((file for split in SPLITS if (file := self._find(split))), None)
        first = next(_lines(present or self._file("train")), {})
        return tuple(first.get("choices") or ())

    def _read_description(self) -> dict[str, Any]:
        file = self.path / "task.json"
        if not file.is_file():
            raise ValueError(f"'{file}' does not exist; write it with name, kind, metric and template.")
        try:
            description = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"'{file}' is not valid JSON ({error}); correct it.") from None
        given = {"metric": self._metric, "template": self._template}
        for key in ("name", "kind", "metric", "template"):
            value = given.get(key) or (description.get(key) if isinstance(description, dict) else None)
            if not isinstance(value, str) or not value:
                raise ValueError(f"'{file}' has no '{key}'; add it as a string.")
        choices = description.get("choices", [])
        if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
            raise ValueError(f"'{file}' has choices {choices!r}; give the label names as a list of strings.")
        return description

    def _read_rows(self, split: Split) -> list[Row]:
        return list(_lines(self._file(split)))

    def _find(self, split: Split) -> Path | None:
        files = (self.path / name for name in (f"{split}.jsonl", f"{split}.jsonl.gz"))
        return next((file for file in files if file.is_file()), None)

    def _file(self, split: Split) -> Path:
        file = self._find(split)
        if file is None:
            raise ValueError(
                f"task folder '{self.path}' has no {split}.jsonl or {split}.jsonl.gz; add the {split} split."
            )
        return file


def _lines(file: Path) -> Iterator[Row]:
    """Reads the rows of a file one by one."""
    opened = gzip.open(file, "rt", encoding="utf-8") if file.suffix == ".gz" else file.open(encoding="utf-8")
    with opened as lines:
        try:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _parse(line, file, number)
        except (EOFError, OSError, UnicodeDecodeError) as error:
            raise ValueError(f"'{file}' is damaged ({error}); write it again.") from None


def _parse(line: str, file: Path, number: int) -> Row:
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    if not isinstance(row, dict):
        raise ValueError(f"'{file}' line {number} is no JSON object; correct or remove it.")
    return row


def _complete(row: Row) -> Row:
    """Fills in the columns that a template may name and derives the target from the label."""
    complete = {"text_pair": "", "keyword": "", **row}
    choices, label = row.get("choices"), row.get("label")
    if "target" not in row and isinstance(choices, list) and isinstance(label, int) and 0 <= label < len(choices):
        complete["target"] = choices[label]
    return complete


def _without_answer(spec: TaskSpec, row: Row) -> Row:
    """Fills in what a row that is only predicted may lack."""
    if not spec.has_options:
        return row
    known = {"choices": list(spec.choices)} if spec.kind == "classification" and row.get("choices") is None else {}
    return {**row, "label": row.get("label"), **known}


def _words(spec: TaskSpec, row: Row) -> int:
    answers = row["choices"] if spec.has_options else [row.get("target") or ""]
    return len(spec.template.format_map(row).split()) + max(len(answer.split()) for answer in answers)
