"""Prompts alone: which training prompts a prior is fitted on, and those of tasks that are none of a run's."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from moe_peft.data.encoding import EncodedRow, Encoder
from moe_peft.data.sources import TaskSource


def encode_prompts(encoder: Encoder, source: TaskSource) -> list[EncodedRow]:
    """Encodes a task's test prompts as no task's, with all of the room to themselves: no answer, no options."""
    spec = replace(source.spec(), kind="generation", metric="exact_match", choices=())
    rows = [{**row, "target": None} for row in source.rows("test", labelled=False)]
    return encoder.encode(spec, -1, rows)


def sample_equally(sizes: Sequence[int], count: int, seeds: Sequence[int]) -> list[int]:
    """Draws row numbers, equally many of every task; what a small task lacks is shared out among the others.

    Args:
        sizes: Rows per task; the rows of all tasks are numbered through.
        count: At most so many.
        seeds: Decide which.

    Returns:
        Row numbers, task by task, in order.
    """
    rng = np.random.default_rng(list(seeds))
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    return [
        int(start + index)
        for start, size, quota in zip(starts, sizes, _equal_quotas(sizes, count), strict=True)
        for index in sorted(rng.permutation(size)[:quota])
    ]


def _equal_quotas(sizes: Sequence[int], count: int) -> list[int]:
    """Shares `count` out equally, no task above its size; what remains after rounding goes to the first tasks."""
    quotas = [0] * len(sizes)
    while count > 0:
        open_tasks = [task for task, size in enumerate(sizes) if quotas[task] < size]
        if not open_tasks:
            break
        share = max(count // len(open_tasks), 1)
        for task in open_tasks[:count]:
            given = min(share, sizes[task] - quotas[task])
            quotas[task] += given
            count -= given
    return quotas
