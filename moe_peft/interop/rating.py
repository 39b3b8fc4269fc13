"""How far a static LoRA is from the routed method that it stands for, on rows that it was not calibrated on."""

import contextlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor

from moe_peft.backbones import Classifier
from moe_peft.batch import Batch
from moe_peft.data.encoding import EncodedRow
from moe_peft.data.evaluation import group_for_evaluation
from moe_peft.data.module import MultitaskDataModule
from moe_peft.interop.approximate import Static, answered, held
from moe_peft.methods.base import MultitaskModule
from moe_peft.methods.evaluation import predict_rows
from moe_peft.methods.scoring import answer_logits, pooled_features
from moe_peft.metrics import Row, score_row

SIDES = ("static", "routed", "base")


class Rating(NamedTuple):
    """What the comparison found."""

    rows: int
    logits: float | None
    """Distance of the static logits of the right answers from the routed ones, relative to that of the bare base's
    (Frobenius); None where there is no bare base to compare with."""
    losses: dict[str, float]
    """Mean loss of the rows by side: answers' negative log-likelihood, or the heads' loss."""
    scores: dict[str, Row]
    """The tasks' own metrics by side."""

    def __str__(self) -> str:
        """Returns one line."""
        parts = [f"on {self.rows} validation rows"]
        if self.logits is not None:
            parts.append(f"logits off by {self.logits:.1%} of what the adapter changes")
        static, routed = self.losses["static"], self.losses["routed"]
        parts.append(f"loss {_each(self.losses, '{:.4f}'.format)} ({(static - routed) / routed:+.1%})")
        metric = ", ".join(dict.fromkeys(score.metric for score in self.scores["static"].tasks.values()))
        parts.append(f"{metric} {_each(self.scores, _points)}")
        return ", ".join(parts)


def _each(values: dict, shown: Callable[..., str]) -> str:
    """Returns all sides' values, the static one's first."""
    return ", ".join(f"{side} {shown(values[side])}" for side in SIDES if side in values)


def _points(row: Row) -> str:
    assert row.mean is not None and row.stderr is not None
    return f"{100 * row.mean:.1f} ±{100 * row.stderr:.1f}"


@torch.no_grad()
def rate(module: MultitaskModule, static: Static, data: MultitaskDataModule) -> Rating | None:
    """Compares static cores with the routed module, and with the bare base, by the module's own protocol.

    Args:
        module: trained, in eval mode.
        static: what replaces its routing, with the rows to compare on.
        data: the run's.

    Returns:
        None where no rows were held out.
    """
    rows = static.held_out
    if not rows:
        return None
    sides = {"static": held(module, static.cores), "routed": contextlib.nullcontext()}
    if module.base_available:
        sides["base"] = module.context.disabled()
    answers, losses, scores = {}, {}, {}
    for side, context in sides.items():
        with context:
            answers[side], losses[side] = _answers(module, data, rows)
            scores[side] = _scores(module, data, rows)
    distance = None
    if "base" in answers:
        apart, whole = ((answers[side] - answers["routed"]).norm().item() for side in ("static", "base"))
        distance = apart / whole if whole else None
    return Rating(len(rows), distance, losses, scores)


def _answers(module: MultitaskModule, data: MultitaskDataModule, rows: Sequence[EncodedRow]) -> tuple[Tensor, float]:
    """Returns the logits that predict the right answers (classifiers: the heads' outputs), and the rows' mean loss."""
    logits, losses = [], []
    for batch in answered(data.collator, rows, module.device):
        losses.append(module(batch))
        logits.append(_logits(module, batch).float().cpu().flatten())
    return torch.cat(logits), torch.cat(losses).double().mean().item()


def _logits(module: MultitaskModule, batch: Batch) -> Tensor:
    if module.heads is None:
        return answer_logits(module.backbone, module.built(), batch).logits
    assert isinstance(module.backbone, Classifier)
    scores = module.heads.scores(pooled_features(module.backbone, module.built(), batch), batch["task_id"])
    return torch.tensor([value for row in scores for value in row])


def _scores(module: MultitaskModule, data: MultitaskDataModule, rows: Sequence[EncodedRow]) -> Row:
    """Returns the tasks' scores by the protocol of a test."""
    predictions = []
    for group in group_for_evaluation(rows, data.eval_batch_size, packed=data.collator.pack):
        predictions += predict_rows(module, move_data_to_device(data.collator.evaluate(group), module.device))
    return score_row(module.specs, predictions, module.ranking)
