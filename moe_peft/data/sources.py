"""Where tasks come from: the base class of all sources, and the task folder.

A source gives a cheap `spec()` (nothing but names is read) and validated `rows(split)`. Add a source by subclassing
`TaskSource` with `_read_spec` and `_read_rows`; its constructor is its YAML schema.
"""

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self, cast

from moe_peft.data.jsonl import read_rows
from moe_peft.data.rows import check_rows, complete, without_answer, words
from moe_peft.data.splits import few_shot, subset
from moe_peft.data.tasks import SPLITS, Kind, Row, Split, TaskSpec, repeated


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
        shots: Trains on so many rows per class, or in all where the task has no classes; None takes all.
        shots_seed: Decides which rows those are.

    Raises:
        ValueError: A limit below 1, a negative seed, or `shots` beside `train_rows`.
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
        shots: int | None = None,
        shots_seed: int = 0,
    ) -> None:
        limits = {"train_rows": train_rows, "validation_rows": validation_rows, "test_rows": test_rows}
        for argument, value in {**limits, "max_words": max_words, "shots": shots}.items():
            if value is not None and value < 1:
                raise ValueError(f"{argument}={value} leaves no rows; use 1 or more, or null for all.")
        if shots is not None and train_rows is not None:
            raise ValueError(f"shots={shots} and train_rows={train_rows} both limit the training rows; give one.")
        if shots_seed < 0:
            raise ValueError(f"shots_seed={shots_seed} must not be negative.")
        self._limits = dict(zip(SPLITS, limits.values(), strict=True))
        self._max_words = max_words
        self._template = template
        self._metric = metric
        self._drop_equal = equal_options == "drop"
        self._shots, self._shots_seed = shots, shots_seed
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

    def under(self, root: Path) -> Self:
        """Gives the same source with its folder looked up in `root`; one without a folder is itself."""
        return self

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
            rows = [complete(row) for row in self._read_rows(split)]
            if not labelled:
                rows = [without_answer(spec, row) for row in rows]
            if self._drop_equal:
                rows = [row for row in rows if repeated(row.get("choices") or ()) is None]
            check_rows(spec, rows, split, labelled)
            if self._max_words is not None:
                rows = [row for row in rows if words(spec, row) <= self._max_words]
                if not rows:
                    raise ValueError(
                        f"task '{spec.name}': max_words={self._max_words} leaves no {split} rows; raise it."
                    )
            if split == "train" and self._shots is not None:
                rows = few_shot(spec, rows, self._shots, self._shots_seed)
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
        shots: Trains on so many rows per class, or in all where the task has no classes; None takes all.
        shots_seed: Decides which rows those are.
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
        shots: int | None = None,
        shots_seed: int = 0,
    ) -> None:
        super().__init__(
            train_rows, validation_rows, test_rows, max_words, template, metric, equal_options, shots, shots_seed
        )
        self.path = Path(path).expanduser()

    def under(self, root: Path) -> Self:
        """Looks a relative path up in `root`."""
        found = copy.copy(self)
        found.path, found._spec, found._rows = root / self.path, None, {}
        return found

    def _read_spec(self) -> TaskSpec:
        if not self.path.is_dir():
            raise ValueError(
                f"task folder '{self.path}' does not exist; give a folder with task.json and jsonl files, or set "
                "data.root to the folder that holds it."
            )
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
            self.file(split)

    def _label_names(self, description: dict[str, Any]) -> tuple[str, ...]:
        if "choices" in description:
            return tuple(description["choices"])
        present = next((file for split in SPLITS if (file := self._find(split))), None)
        first = next(read_rows(present or self.file("train")), {})
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
        return list(read_rows(self.file(split)))

    def _find(self, split: Split) -> Path | None:
        files = (self.path / name for name in (f"{split}.jsonl", f"{split}.jsonl.gz"))
        return next((file for file in files if file.is_file()), None)

    def file(self, split: Split) -> Path:
        """Returns the file of a split's rows.

        Raises:
            ValueError: there is none.
        """
        file = self._find(split)
        if file is None:
            raise ValueError(
                f"task folder '{self.path}' has no {split}.jsonl or {split}.jsonl.gz; add the {split} split."
            )
        return file
