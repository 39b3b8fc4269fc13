"""Which rows a mixture refuses: those in which its router has less confidence than a threshold; all in plain numbers.

Shapes: N rows of the mixture, M rows from elsewhere.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moe_peft.methods.evaluation import CONFIDENCE
from moe_peft.predictions import Prediction

NO_LIMIT = torch.finfo(torch.float32).min
"""No confidence is below it; finite, as everything that a checkpoint holds."""


def threshold(confidences: Tensor, keep: float) -> float:
    """Returns the largest of the confidences [N] which at least a share `keep` of them reaches."""
    stay = max(1, math.ceil(round(keep * len(confidences), 6)))  # rounded: 0.55 * 100 is more than 55
    return confidences.sort(descending=True).values[stay - 1].item()


def confidences_of(predictions: Sequence[Prediction]) -> Tensor:
    """Returns the router's confidence in every row that it was asked about: [N] fp64, of fp32 values."""
    asked = [row.routing[CONFIDENCE] for row in predictions if row.routing and CONFIDENCE in row.routing]
    return torch.tensor(asked, dtype=torch.float64)


class Refusal(NamedTuple):
    """How the rows of one line of the report fared."""

    inputs: str
    """Whose rows: "mixture" or "outside"."""
    task: str
    """Of which task, or "all"."""
    rows: int
    confidence: float
    """Their median."""
    refused: float
    """Share below the threshold."""
    auroc: float | None
    """Of confidence at telling all of the mixture's rows from these."""


def refusals(inside: Tensor, outside: Mapping[str, Tensor], threshold: float) -> list[Refusal]:
    """Returns the lines of the report.

    Args:
        inside: confidences [N] of the mixture's rows.
        outside: confidences [M] of rows from elsewhere, by task.
        threshold: rows below it are refused.
    """

    def line(inputs: str, task: str, own: Tensor) -> Refusal:
        refused = (own < threshold).double().mean().item()
        apart = auroc(inside, own) if inputs == "outside" else None
        return Refusal(inputs, task, len(own), own.median().item(), refused, apart)

    everything = [("all", torch.cat(list(outside.values())))] if outside else []
    others = [line("outside", task, own) for task, own in (*outside.items(), *everything)]
    return [line("mixture", "all", inside), *others]


def auroc(inside: Tensor, outside: Tensor) -> float:
    """Returns how probable more confidence in a row of the mixture [N] is than in one from elsewhere [M].

    A tie counts half.
    """
    from torchmetrics.functional.classification import binary_auroc

    joined, labels = torch.cat([inside, outside]), torch.arange(len(inside) + len(outside)) < len(inside)
    # By rank: torchmetrics takes numbers beyond 0..1 for logits, and their sigmoids would be equal where they are not.
    ranks = joined.unique(return_inverse=True)[1] / len(joined)
    return binary_auroc(ranks, labels.long()).item()


def summary(table: Sequence[Refusal]) -> str:
    """Says it all in one line."""
    mixture, *others = table
    text = f"null expert: {1 - mixture.refused:.1%} of the mixture's {mixture.rows} test rows stay"
    if not others:
        return text
    apart = ", ".join(f"{line.task} {line.auroc:.3f}" for line in others)
    return f"{text}, {others[-1].refused:.1%} of {others[-1].rows} rows from elsewhere are refused; AUROC {apart}"
