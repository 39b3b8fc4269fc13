"""A task out of a `datasets` data set, saved to disk or on the hub, by a mapping of its columns."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from moe_peft.data.hub import load_splits
from moe_peft.data.sources import TaskSource
from moe_peft.data.splits import cut, drop_repeats, halves, stable_seed
from moe_peft.data.tasks import SPLITS, Kind, Row, Split, TaskSpec

HALVES_SEED = 1189
"""Permutes a split before it is cut in two: the seed of MoRE's code, so that its evaluated rows are our test rows."""
_COLUMNS = ("id", "text", "text_pair", "keyword", "choices", "choice_keys", "label", "target", "value", "group")


class DatasetsTask(TaskSource):
    """A `datasets` data set with a column mapping.

    Splits that the data set lacks are cut from the first one it has (by group, fixed seed), and `note` then says so.
    Examples that occur in two splits are kept in test before validation before train.

    `halves` is for data sets whose test labels are hidden, as GLUE's. MoRE's code selects and reports on the same rows:
    the second half of a permuted validation split (cola, mrpc, rte, stsb) or all of it (the others). Here the second
    half of that permutation is the test split, and selection sees the first half only.

    Args:
        path: A folder written by `save_to_disk`, or a hub id.
        name: The task's name.
        kind: classification, multiple_choice, regression or generation.
        columns: Maps a field to a column of the data set (`a.b` reaches into a struct). Fields: id, text, text_pair,
            keyword, choices (a list of texts), choice_keys (the names that labels use, such as A, B), label (index,
            key, or one of the choices), target, value, group (rows of one group stay in one split).
        template: The prompt, with fields in braces.
        metric: The metric; "accuracy" where not given.
        config: The hub data set's configuration.
        splits: Maps train, validation and test to the data set's split names; the same names where not given.
        halves: A split of the data set that is permuted (seed 1189, as MoRE's code does) and cut in two: validation is
            its first half, test its second; leave both out of `splits` then.
        choices: Label names of a classification task; from the data set's own label feature where not given.
        choice_columns: The columns that hold the options one by one, in place of `columns.choices`.
        label_offset: What the first option's label is, for labels that count from 1.
        shuffle_choices: Puts each row's options in a fixed random order (for sets that list the right one first).
        validation_fraction: Share for validation where splits are cut.
        test_fraction: Share for test where splits are cut.
        train_rows: At most so many training rows (a fixed random subset).
        validation_rows: The same for validation.
        test_rows: The same for test.
        max_words: Leaves out rows with more words in prompt and longest option together.
        equal_options: What becomes of a row with two equal options: an error, or the row is left out.
        shots: Trains on so many rows per class, or in all where the task has no classes; None takes all.
        shots_seed: Decides which rows those are.
    """

    def __init__(
        self,
        path: str,
        name: str,
        kind: Kind,
        columns: dict[str, str],
        template: str,
        metric: str = "accuracy",
        config: str | None = None,
        splits: dict[str, str] | None = None,
        halves: str | None = None,
        choices: list[str] | None = None,
        choice_columns: list[str] | None = None,
        label_offset: int = 0,
        shuffle_choices: bool = False,
        validation_fraction: float = 0.1,
        test_fraction: float = 0.2,
        train_rows: int | None = None,
        validation_rows: int | None = None,
        test_rows: int | None = None,
        max_words: int | None = None,
        equal_options: Literal["error", "drop"] = "error",
        shots: int | None = None,
        shots_seed: int = 0,
    ) -> None:
        super().__init__(
            train_rows, validation_rows, test_rows, max_words, template, metric, equal_options, shots, shots_seed
        )
        for field in columns:
            if field not in _COLUMNS:
                raise ValueError(f"task '{name}': columns names the field '{field}'; use {', '.join(_COLUMNS)}.")
        for split in splits or {}:
            if split not in SPLITS:
                raise ValueError(f"task '{name}': splits names '{split}'; use {', '.join(SPLITS)}.")
        if halves is not None and set(splits or {}) - {"train"}:
            raise ValueError(f"task '{name}': halves='{halves}' makes validation and test; leave them out of splits.")
        if min(validation_fraction, test_fraction) <= 0 or validation_fraction + test_fraction >= 1:
            raise ValueError(
                f"task '{name}': validation_fraction={validation_fraction} and test_fraction={test_fraction} "
                "leave a split empty; both must be above 0 and their sum below 1."
            )
        self.kind: Kind = kind
        self.path, self.name, self.config = path, name, config
        self.columns, self.halves = columns, halves
        self.splits = splits or {split: split for split in (SPLITS if halves is None else SPLITS[:1])}
        self.choices, self.choice_columns = choices, choice_columns
        self.label_offset, self.shuffle_choices = label_offset, shuffle_choices
        self.fractions: dict[Split, float] = {
            "train": 1 - validation_fraction - test_fraction,
            "validation": validation_fraction,
            "test": test_fraction,
        }
        self._loaded: Mapping[str, Any] | None = None
        self._cut: dict[Split, list[Row]] | None = None

    @property
    def note(self) -> str:
        """Says where splits come from that the data set does not have."""
        if self.halves is not None:
            return f"validation and test are halves of {self.halves}"
        present = [split for split in SPLITS if self.splits.get(split) in self._data()]
        source = "dev" if present[:1] == ["validation"] else "".join(present[:1])
        return "" if len(present) == len(SPLITS) else f"cut from {source}"

    def _read_spec(self) -> TaskSpec:
        choices = tuple(self._label_names()) if self.kind == "classification" else ()
        return TaskSpec(self.name, self.kind, self._metric or "accuracy", self._template or "", choices)

    def _read_rows(self, split: Split) -> list[Row]:
        if self._cut is None:
            self._cut = self._all_rows()
        return self._cut[split]

    def _data(self) -> Mapping[str, Any]:
        """Loads the data set: its splits by their own names."""
        if self._loaded is None:
            self._loaded = load_splits(self.path, self.config, self.name)
            if not any(self.splits.get(split) in self._loaded for split in SPLITS):
                raise ValueError(
                    f"task '{self.name}': '{self.path}' has the splits {', '.join(self._loaded)}; "
                    "map train, validation and test to them with the argument splits."
                )
            if self.halves is not None and self.halves not in self._loaded:
                raise ValueError(
                    f"task '{self.name}': halves='{self.halves}' is no split of '{self.path}'; "
                    f"use one of {', '.join(self._loaded)}."
                )
        return self._loaded

    def _label_names(self) -> list[str]:
        if self.choices:
            return self.choices
        column = next(iter(self._data().values())).features.get(self.columns.get("label", "label"))
        if not getattr(column, "names", None):
            raise ValueError(f"task '{self.name}': '{self.path}' has no label names; give the argument choices.")
        return list(column.names)

    def _all_rows(self) -> dict[Split, list[Row]]:
        data = self._data()
        found: dict[Split, list[Row]] = {}
        for split, (own, places) in self._places().items():
            raw = zip(places, data[own].select(places), strict=True)
            found[split] = [self._row(record, f"{self.name}-{own}-{i}") for i, record in raw]
        found = drop_repeats(found, options_in_key=self.kind == "multiple_choice")
        if len(found) == len(SPLITS):
            return found
        donor = next(iter(found))
        missing: dict[Split, float] = {
            split: share for split, share in self.fractions.items() if split == donor or split not in found
        }
        groups = self._groups(found[donor])
        return {**found, **cut(found[donor], groups, missing, seed=stable_seed(self.name))}

    def _places(self) -> dict[Split, tuple[str, Sequence[int]]]:
        """Where the rows of every split lie that the data set has: in which of its own splits, at which places."""
        sizes = {own: len(part) for own, part in self._data().items()}
        places: dict[Split, tuple[str, Sequence[int]]] = {}
        for split in SPLITS:
            own = self.splits.get(split)
            if own in sizes:
                places[split] = own, range(sizes[own])
        if self.halves is not None:
            first, second = halves(sizes[self.halves], HALVES_SEED)
            places |= {"validation": (self.halves, first), "test": (self.halves, second)}
        return places

    def _groups(self, rows: list[Row]) -> list[str]:
        """Names every row's group: rows of one group stay in one split."""
        return [row.get("group") or row["id"] for row in rows]

    def _row(self, record: dict[str, Any], default_id: str) -> Row:
        row: Row = {field: _reach(record, path, self.name) for field, path in self.columns.items()}
        row["id"] = str(row.get("id") or default_id)
        for field in ("text", "text_pair", "keyword", "target"):
            if isinstance(row.get(field), str):
                row[field] = row[field].strip()
        if row.get("group") is not None:
            row["group"] = str(row["group"])
        if self.kind in ("classification", "multiple_choice"):
            self._fill_choices(row, record)
        row.pop("choice_keys", None)
        return row

    def _fill_choices(self, row: Row, record: dict[str, Any]) -> None:
        if self.kind == "classification":
            row["choices"] = list(self.spec().choices)
        elif self.choice_columns:
            row["choices"] = [_reach(record, column, self.name) for column in self.choice_columns]
        row["choices"] = [str(choice).strip() for choice in row.get("choices") or []]
        row["label"] = self._label(row)
        label: int | None = row["label"]
        if self.shuffle_choices:
            order = np.random.default_rng(stable_seed(self.name, row["text"])).permutation(len(row["choices"]))
            row["choices"] = [row["choices"][index] for index in order]
            label = row["label"] = None if label is None else int(np.flatnonzero(order == label)[0])
        row["target"] = None if label is None else row["choices"][label]

    def _label(self, row: Row) -> int | None:
        """Gives the index of the right option; None for a row without answer (-1 is how hub sets write that)."""
        value: Any = row.get("label", row.get("target"))
        if value is None or value == -1:
            return None
        keys = [str(key) for key in row.get("choice_keys") or []]
        if isinstance(value, str) and value in keys:
            return keys.index(value)
        if isinstance(value, str) and value.strip() in row["choices"]:
            return row["choices"].index(value.strip())
        try:
            label = int(value) - self.label_offset
        except (TypeError, ValueError):
            label = -1
        if not 0 <= label < len(row["choices"]):
            raise ValueError(
                f"task '{self.name}', row '{row['id']}': label {value!r} is outside its choices {row['choices']}; "
                "correct columns, choices or label_offset."
            )
        return label


def _reach(record: dict[str, Any], path: str, name: str) -> Any:
    """Follows `a.b` into a record: a column's values have any type."""
    value: Any = record
    for part in path.split("."):
        if not isinstance(value, dict) or part not in value:
            raise ValueError(f"task '{name}': there is no column '{path}'; it has {', '.join(record)}.")
        value = value[part]
    return value
