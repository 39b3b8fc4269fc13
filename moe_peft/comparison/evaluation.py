"""Ranking a row's options, in turns on the same rows: side by side behind one prompt, or each as its own sequence.

Shapes: B rows, K options of a row, S tokens, V vocabulary.
"""

import random
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from rich import box
from rich.table import Table
from torch import Tensor
from torch.nn.functional import cross_entropy

from moe_peft.backbones import Backbone
from moe_peft.batch import IGNORE_INDEX
from moe_peft.comparison.steps import LORA, METHODS, build, time_ratios
from moe_peft.data.collate import Collator
from moe_peft.data.encoding import EncodedRow
from moe_peft.data.evaluation import group_for_evaluation
from moe_peft.data.module import MultitaskDataModule
from moe_peft.methods.base import MultitaskModule
from moe_peft.methods.scoring import option_scores, position_ids

PACKED, APART, PLAIN = "one prompt", "apart", "apart, full head"
"""Options side by side behind one prompt, ours; each as its own sequence, ours; the same as a plain script does it."""
TOLERANCE = 1e-4
"""Largest accepted difference of two scores on a float32 base."""


class Comparison(NamedTuple):
    """What was found, batch by batch."""

    seconds: dict[str, list[float]]
    """CPU seconds of every way."""
    differences: dict[str, float]
    """Largest difference of an option's score from the plain way's."""
    rows: int
    options: int


def compare_evaluation(
    data: MultitaskDataModule, backbone: Backbone, task: str, rows: int, rounds: int, threads: int
) -> Comparison:
    """Ranks a task's test rows in all three ways with a LoRA that is not zero.

    Args:
        data: has the task.
        backbone: the base; a decoder that packs options.
        task: by name.
        rows: at most so many, of all lengths.
        rounds: times that every batch is scored.
        threads: of torch.

    Raises:
        ValueError: no such task, one without options, or a base that does not pack.
        RuntimeError: on a float32 base, two ways that score an option differently.
    """
    names = [spec.name for spec in data.specs]
    if task not in names or not data.specs[names.index(task)].has_options:
        raise ValueError(f"task: {task!r} is no task with options; use one of {', '.join(names)}")
    if not backbone.packs_options(data.max_length):
        raise ValueError(f"backbone {backbone.name!r}: does not score options side by side, so nothing is compared")
    torch.set_num_threads(threads)
    data.setup("test")
    own = [row for row in data.rows("test") if row.task_id == names.index(task)]
    own = random.Random(0).sample(own, min(rows, len(own)))
    module = build(METHODS[LORA], data, backbone).eval()
    pad = backbone.tokenizer().pad_token_id
    ways = ways_of(module, Collator("causal", pad), Collator("causal", pad, pack=False))
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    differences = dict.fromkeys(ways, 0.0)
    order = random.Random(0)
    for batch in group_for_evaluation(own, data.eval_batch_size, packed=True) * rounds:
        found = {}
        for name in order.sample(list(ways), len(ways)):
            start = time.process_time()
            found[name] = torch.tensor(sum(ways[name](batch), []))
            seconds[name].append(time.process_time() - start)
        for name, scores in found.items():
            differences[name] = max(differences[name], (scores - found[PLAIN]).abs().max().item())
    for name, difference in differences.items():
        if backbone.dtype == torch.float32 and not difference <= TOLERANCE:
            raise RuntimeError(f"scores of {name} and {PLAIN} differ by {difference:.1e}, more than {TOLERANCE}")
    return Comparison(seconds, differences, len(own), sum(len(row.options) for row in own))


def ways_of(
    module: MultitaskModule, packing: Collator, apart: Collator
) -> dict[str, Callable[[list[EncodedRow]], list[list[float]]]]:
    """Returns the three ways to score the options of rows, by name."""

    @torch.no_grad()
    def ours(rows: list[EncodedRow], collator: Collator) -> list[list[float]]:
        batch = collator.evaluate(rows)
        module.begin(batch)
        return option_scores(module.backbone, module.built(), batch)

    @torch.no_grad()
    def plain(rows: list[EncodedRow]) -> list[list[float]]:
        batch = apart.evaluate(rows)
        module.begin(batch)
        mask: Tensor = batch["attention_mask"]
        positions = position_ids(mask)  # which a script that pads on the right does not need to say
        inputs = {"input_ids": batch["input_ids"], "attention_mask": mask, "position_ids": positions}
        logits = module.built()(**inputs, use_cache=False).logits[:, :-1].float()
        labels = batch["labels"][:, 1:]
        # Flat: over a dimension that is not the last one, torch sums a vocabulary to 1e-3 only.
        losses = cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE_INDEX, reduction="none")
        losses = losses.view(labels.shape)
        return [part.tolist() for part in (-losses.sum(1)).split([len(row.options) for row in rows])]

    return {PACKED: lambda rows: ours(rows, packing), APART: lambda rows: ours(rows, apart), PLAIN: plain}


def ratios(comparison: Comparison) -> dict[str, dict[str, float]]:
    """Returns every way's time over every other's: the median, over batches, of the ratio on one batch."""
    return time_ratios(comparison.seconds)


def table(comparison: Comparison, title: str) -> Table:
    """Lays out the times, the ratios to the ways that score every option by itself, and the scores' differences."""
    result = Table("options", title=title, title_justify="left", box=box.SIMPLE)
    for name in ("CPU s", f"/ {APART}", f"/ {PLAIN}", "scores differ"):
        result.add_column(name, justify="right", no_wrap=True)
    for name, found in ratios(comparison).items():
        shown = [f"{found[other]:.2f}" for other in (APART, PLAIN)]
        result.add_row(name, f"{sum(comparison.seconds[name]):.2f}", *shown, f"{comparison.differences[name]:.0e}")
    return result
