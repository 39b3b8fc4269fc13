"""What a model answered on one row, as kept in memory, in JSONL files and in the cache of the base's answers."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Literal, Self

from moe_peft.data.tasks import TaskSpec
from moe_peft.optim import LOWER_THE_RATE

NOBODY = "none"
"""Instead of a task, where no expert was good enough for a row."""
Ranking = Literal["sum", "per_char"]
"""How options are ranked: by summed log-likelihood, or by log-likelihood per character of the option."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a model answered on one row, and what was right.

    Args:
        row_id: `<task>/<id>`, unique over the split.
        task: index into the data module's specs.
        label: gold option or class; None where the row has none.
        target: gold text.
        value: gold number (regression).
        scores: summed log-likelihood per option, or class logits; () for generation and regression.
        chars: characters per option; () for classifier heads.
        text: generated text.
        predicted_value: predicted number; None where the generated text is no number.
        routing: summary of the routing of this row, if one was asked for.
    """

    row_id: str
    task: int
    label: int | None
    target: str | None
    value: float | None
    scores: tuple[float, ...]
    chars: tuple[int, ...]
    text: str | None
    predicted_value: float | None
    routing: dict[str, float] | None = None

    def choice(self, ranking: Ranking) -> int:
        """The best-scored option; the first one of equals.

        Raises:
            ValueError: there are no scores, or one of them is NaN.
        """
        if not self.scores or any(math.isnan(score) for score in self.scores):
            raise ValueError(
                f"row '{self.row_id}': scores={self.scores} have no best option; the model diverged or the precision "
                f"overflows: {LOWER_THE_RATE}, or evaluate in bf16 or fp32"
            )
        scores = self.scores
        if ranking == "per_char" and self.chars:
            scores = tuple(score / max(chars, 1) for score, chars in zip(scores, self.chars, strict=True))
        return scores.index(max(scores))

    def to_json(self, ranking: Ranking = "sum", task_name: str | None = None) -> str:
        """One JSON line: the fields, the choice under `ranking` where there are options, the task's name if given."""
        record = asdict(self)
        if self.scores:
            record["choice"] = self.choice(ranking)
        if task_name is not None:
            record["task_name"] = task_name
        return json.dumps(record, ensure_ascii=False)

    @classmethod
    def from_json(cls, line: str) -> Self:
        """Reads what `to_json` wrote.

        Raises:
            ValueError: the line is no such record.
        """
        record = json.loads(line)
        try:
            known = {field.name: record[field.name] for field in fields(cls)}
            known |= {"scores": tuple(known["scores"]), "chars": tuple(known["chars"])}
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a prediction ({error!r}): {line[:80]!r}") from None
        return cls(**known)


def majority_predictions(
    specs: Sequence[TaskSpec], predictions: Sequence[Prediction], majority: Mapping[str, int]
) -> list[Prediction]:
    """The answers of a model that always picks the most frequent label of the train split.

    Args:
        specs: the tasks.
        predictions: whose rows to answer.
        majority: label index by task name; rows of other tasks are left out (regression and generation have none).

    Returns:
        One-hot scores per row. A row with too few options for the majority's index gets its first option.
    """
    return [
        replace(
            row,
            scores=tuple(float(option == majority[specs[row.task].name]) for option in range(len(row.scores))),
            chars=(),
            routing=None,
        )
        for row in predictions
        if specs[row.task].name in majority and row.scores
    ]
