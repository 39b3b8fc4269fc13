"""Validation, test and prediction: every row becomes a `Prediction`, every task its own metric.

Options of a row are ranked by the log-likelihood of their text (no end token) in one batched pass; heads give class
scores; generation tasks are decoded greedily. At test time the untouched backbone may score the same rows in the same
pass (`score_base`), as the first row of the results table.
"""

import re
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from moe_peft.batch import Batch
from moe_peft.data.tasks import TaskSpec
from moe_peft.methods.heads import as_own_answer
from moe_peft.methods.scoring import generate_text, option_scores, pooled_features
from moe_peft.methods.training import Part
from moe_peft.metrics import score_row
from moe_peft.predictions import Prediction
from moe_peft.sharding import release

if TYPE_CHECKING:
    from moe_peft.methods.base import MultitaskModule

ROUTED_AS = "as_task/"
"""In a prediction's routing: the task that a row was routed as, where that is not its own."""
CONFIDENCE = "confidence"
"""In a prediction's routing: how sure the router was that the row belongs to any expert."""
NUMBER = re.compile(r"[-+]?\d*\.?\d+")


class EvaluationSteps(Part):
    """The evaluation half of `MultitaskModule`; keeps predictions of the running epoch in `predictions`."""

    score_base: bool = False
    """Score the bare backbone beside the adapted one in the test epoch (set by the Results callback)."""

    def __init__(self) -> None:
        super().__init__()
        self.predictions: dict[str, list[Prediction]] = {}

    @property
    def base_available(self) -> bool:
        """Whether the bare backbone can answer: not where the answer needs heads that only training makes."""
        return getattr(self, "heads", None) is None

    def on_validation_epoch_start(self) -> None:
        """Forgets the last epoch's predictions."""
        self.predictions = {"model": []}

    def on_test_epoch_start(self) -> None:
        """Forgets the last epoch's predictions."""
        self.predictions = {"model": [], "base": []} if self.score_base else {"model": []}

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Scores the batch's rows."""
        self.predictions["model"] += predict_rows(self._module(), batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Scores the batch's rows, with the bare backbone too where asked."""
        self.predictions["model"] += predict_rows(self._module(), batch)
        if self.score_base:
            with self._module().context.disabled():
                self.predictions["base"] += predict_rows(self._module(), batch)

    def predict_step(self, batch: Batch, batch_idx: int) -> list[Prediction]:
        """Returns one prediction per row, with its routing summary."""
        context = self._module().context
        context.recording = True
        try:
            return predict_rows(self._module(), batch)
        finally:
            context.recording = False

    def on_validation_epoch_end(self) -> None:
        """Logs each task's metric, their mean (`val/mean`, the monitored value) and the method's diagnostics."""
        module = self._module()
        release(module)
        self.predictions = {"model": gather(self.predictions["model"])}
        if self.trainer.sanity_checking:
            return
        self._log_scores("val", self.predictions["model"])
        if self.trainer.state.fn == TrainerFn.FITTING:
            self.log_dict(module.diagnostics())

    def on_test_epoch_end(self) -> None:
        """Gathers the predictions of all ranks and logs the mean."""
        release(self._module())
        self.predictions = {name: gather(own) for name, own in self.predictions.items()}
        self._log_scores("test", self.predictions["model"])

    def _log_scores(self, stage: str, predictions: list[Prediction]) -> None:
        """Logs `<stage>/<task>/<metric>` and `<stage>/mean` (of primary metrics), over the tasks that have rows."""
        scores = score_row(self._module().specs, predictions, self._module().ranking).tasks
        for name, score in scores.items():
            values = {score.metric: score.value, **score.beside}
            self.log_dict({f"{stage}/{name}/{metric}": value for metric, value in values.items()})
        routing = self._module().routing_metrics(predictions)
        self.log_dict({f"{stage}/{name}": value for name, value in routing.items()})
        self.log(f"{stage}/mean", sum(score.value for score in scores.values()) / len(scores), prog_bar=True)


def gather(own: list[Prediction]) -> list[Prediction]:
    """Joins the predictions of all ranks, ordered by row id, each row once."""
    parts: list[Any] = [own]
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        parts = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(parts, own)
    found: dict[str, Prediction] = {}
    for prediction in (prediction for part in parts for prediction in part):
        found.setdefault(prediction.row_id, prediction)  # a rank without rows of its own repeats the first rank's
    return sorted(found.values(), key=lambda p: p.row_id)


@torch.no_grad()
def predict_rows(module: "MultitaskModule", batch: Batch) -> list[Prediction]:
    """Predicts every row of an evaluation batch (options of a row are consecutive sequences)."""
    module.begin(batch)
    model, rows = module.built(), batch["rows"]
    options: list[list[float]] = [[] for _ in rows]
    texts: list[str | None] = [None] * len(rows)
    if module.heads is not None:
        features = pooled_features(module.backbone, model, batch)  # type: ignore[arg-type]
        options = head_answers(module, features, batch)
    elif module.specs[int(batch["task_id"][0])].has_options:
        options = option_scores(module.backbone, model, batch)
    else:
        texts = list(generate_text(module.backbone, model, batch, module.max_new_tokens))
    per_row = len(batch["row_id"]) == len(rows)
    first = list(range(len(rows))) if per_row else np.cumsum([0] + [len(row["choices"]) for row in rows[:-1]]).tolist()
    routing = routing_summary(module, batch, first)
    task_ids = batch["task_id"].tolist()
    return [
        as_prediction(module, batch["row_id"][at], task_ids[at], row, scores, text, summary)
        for at, row, scores, text, summary in zip(first, rows, options, texts, routing, strict=True)
    ]


def head_answers(module: "MultitaskModule", features: Tensor, batch: Batch) -> list[list[float]]:
    """Returns scores of each row's own classes, whichever task's head answers it."""
    assert module.heads is not None
    heads = module.head_tasks(batch)
    answers = module.heads.scores(features, heads)
    for at, (own, other) in enumerate(zip(batch["task_id"].tolist(), heads.tolist(), strict=True)):
        if own != other:
            spec, label = module.specs[own], batch["rows"][at].get("label")
            answers[at] = as_own_answer(spec, module.specs[other] if other >= 0 else None, answers[at], label)
    return answers


def as_prediction(
    module: "MultitaskModule",
    row_id: str,
    task: int,
    row: dict,
    scores: list[float],
    text: str | None,
    routing: dict[str, float] | None,
) -> Prediction:
    """Joins a row and what was predicted for it."""
    regression = module.specs[task].kind == "regression"
    predicted = scores[0] if regression and scores else None
    if regression and text is not None:
        found = NUMBER.search(text)
        predicted = float(found.group()) if found else None
    return Prediction(
        row_id=row_id,
        task=task,
        label=row.get("label"),
        target=row.get("target"),
        value=row.get("value"),
        scores=() if regression else tuple(scores),
        chars=() if module.heads is not None else tuple(map(len, row.get("choices", ()))),
        text=text,
        predicted_value=predicted,
        routing=routing,
    )


def routing_summary(module: "MultitaskModule", batch: Batch, first: list[int]) -> list[dict[str, float] | None]:
    """Mean routing weight of every expert over a row's real tokens and all layers, where routing was recorded.

    A row that was routed as another task says in any case which one, and how sure the router was if it was asked.

    Args:
        module: its context holds the records of the batch's forward.
        batch: the batch.
        first: index of the first sequence of every row.
    """
    records = list(module.context.records.values())
    sequences = len(batch["row_id"])
    known = [{ROUTED_AS + name: 1.0} if name else {} for name in routed_as(module, batch, first)]
    confidence = module.context.get(CONFIDENCE, sequences)
    if confidence is not None:
        values = confidence.tolist()
        known = [row | {CONFIDENCE: values[at]} for at, row in zip(first, known, strict=True)]
    if not records or any(record.weights.shape[0] not in (1, sequences) for record in records):
        return [row or None for row in known]
    mask = batch["attention_mask"].to(torch.float32)
    mask = mask / mask.sum(1, keepdim=True)
    total: Tensor = torch.zeros(())
    for record in records:
        weights = record.weights.float().expand(sequences, -1, -1)
        fits = weights.shape[1] == mask.shape[1]
        total = total + (torch.einsum("bs,bse->be", mask, weights) if fits else weights.mean(1)).cpu() / len(records)
    return [
        {f"expert_{index}": round(value, 6) for index, value in enumerate(total[at].tolist())} | row
        for at, row in zip(first, known, strict=True)
    ]


def routed_as(module: "MultitaskModule", batch: Batch, first: list[int]) -> list[str | None]:
    """Returns for every row the known task that it was routed as, None where that is its own."""
    rows, own = module.context.get("task_id", len(batch["row_id"])), batch["task_id"]
    if rows is None:
        return [None] * len(first)
    pairs = list(zip(rows.tolist(), own.tolist(), strict=True))
    return [None if pairs[at][0] == pairs[at][1] else module.task_of_row(pairs[at][0]) for at in first]


def routed_shares(specs: Sequence[TaskSpec], predictions: Sequence[Prediction]) -> dict[str, dict[str, float]]:
    """Returns which share of an unknown task's rows was routed as which known task: {task: {known: share}}."""
    counts: dict[str, Counter[str]] = {}
    for prediction in predictions:
        for name in prediction.routing or {}:
            if name.startswith(ROUTED_AS):
                counts.setdefault(specs[prediction.task].name, Counter())[name.removeprefix(ROUTED_AS)] += 1
    return {task: {name: count / own.total() for name, count in sorted(own.items())} for task, own in counts.items()}


def confusion(specs: Sequence[TaskSpec], predictions: Sequence[Prediction]) -> dict[str, Counter[str]]:
    """Counts for every task how many of its rows were routed as which task: {task: {routed as: rows}}."""
    table: dict[str, Counter[str]] = {spec.name: Counter() for spec in specs}
    for prediction in predictions:
        own = specs[prediction.task].name
        others = [name for name in prediction.routing or {} if name.startswith(ROUTED_AS)]
        table[own][others[0].removeprefix(ROUTED_AS) if others else own] += 1
    return table
