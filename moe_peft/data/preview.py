"""What a mixture really is, before any training: rows, filled-in templates, lengths, truncation, the mix drawn."""

from collections import Counter

import numpy as np
from jsonargparse import ArgumentError

from moe_peft.counting import SECTIONS, model_parser
from moe_peft.data.encoding import EncodedRow
from moe_peft.data.module import MultitaskDataModule
from moe_peft.data.splits import content
from moe_peft.data.tasks import SPLITS, TaskSpec
from moe_peft.messages import one_line


def load_data_module(arguments: list[str]) -> MultitaskDataModule:
    """Makes the data module of a run's configuration; of the model only the backbone is used.

    Args:
        arguments: `--config FILE`, several times if need be, and `--data.init_args.batch_size 8` and the like, as
            `python -m moe_peft fit` takes them.

    Raises:
        ValueError: One line that names the bad or missing argument.
    """
    parser = model_parser(ignored=[section for section in SECTIONS if section != "data"])
    parser.add_subclass_arguments(MultitaskDataModule, "data", required=True)
    parser.link_arguments("model.init_args.backbone", "data.init_args.backbone")
    try:
        config = parser.parse_args(arguments)
    except ArgumentError as error:
        raise ValueError(one_line(str(error))) from None
    config.pop("model")
    return parser.instantiate_classes(config)["data"]


def describe_mix(arguments: list[str], batches: int) -> str:
    """Describes the mixture of a run's configuration; see `load_data_module` and `preview`."""
    return preview(load_data_module(arguments), batches)


def preview(data: MultitaskDataModule, batches: int) -> str:
    """Describes a mixture.

    Args:
        data: The data module.
        batches: How many global batches to draw for the mix.
    """
    parts = [_table(data)]
    for task_id, spec in enumerate(data.specs):
        parts.append(_example(data, spec, next(row for row in data.rows("train") if row.task_id == task_id)))
    parts += [_lengths(data), _mix(data, batches)]
    return "\n\n".join(parts)


def _table(data: MultitaskDataModule) -> str:
    lines = [["task", "kind", "metric", *SPLITS, "train rows also in test", "note"]]
    for spec, source in zip(data.specs, data.sources, strict=True):
        rows = {split: source.rows(split) for split in SPLITS}
        key = spec.kind == "multiple_choice"
        tested = {content(row, key) for row in rows["test"]}
        shared = sum(content(row, key) in tested for row in rows["train"])
        counts = [str(len(rows[split])) for split in SPLITS]
        lines.append([spec.name, spec.kind, spec.metric, *counts, str(shared), source.note])
    return "Tasks\n" + _columns(lines)


def _example(data: MultitaskDataModule, spec: TaskSpec, row: EncodedRow) -> str:
    tokenizer = data.backbone.tokenizer()
    shown = [
        f"{row.row_id}  template {spec.template!r}",
        f"  prompt  {tokenizer.decode(row.prompt)!r}",
        f"  answer  {tokenizer.decode(row.answer)!r}" if row.answer else f"  target  {row.target}",
    ]
    if row.options:
        shown.append(f"  options {[tokenizer.decode(option) for option in row.options]}")
    return "\n".join(shown)


def _lengths(data: MultitaskDataModule) -> str:
    """Tokens of prompt and longest answer together, and how many prompts were cut."""
    lines = [["task", "split", "rows", "p50", "p90", "p99", "max", "prompts cut", "tokens cut"]]
    for task_id, spec in enumerate(data.specs):
        for split in SPLITS:
            rows = [row for row in data.rows(split) if row.task_id == task_id]
            lengths = [len(row.prompt) + max(map(len, [row.answer, *row.options])) for row in rows]
            quantiles = [f"{value:.0f}" for value in np.quantile(lengths, [0.5, 0.9, 0.99, 1.0])]
            cut = [row.truncated for row in rows if row.truncated]
            lines.append([spec.name, split, str(len(rows)), *quantiles, str(len(cut)), str(sum(cut))])
    return f"Tokens (max_length={data.max_length})\n" + _columns(lines)


def _mix(data: MultitaskDataModule, batches: int) -> str:
    """Counts the rows of the first global batches, epoch after epoch, as training would draw them."""
    sampler = data.train_dataloader().multitask_sampler
    drawn: list[np.ndarray] = []
    epoch = 0
    while len(drawn) < batches:
        drawn += list(sampler.plan(epoch))
        epoch += 1
    rows = data.rows("train")
    total = [row for batch in drawn[:batches] for row in batch]
    counts = Counter(rows[row].task_id for row in total)
    distinct = Counter(rows[row].task_id for row in set(total))
    sizes = Counter(row.task_id for row in rows)
    lines = [["task", "rows drawn", "share", "distinct rows", "share of the data"]]
    for task_id, spec in enumerate(data.specs):
        own = counts[task_id]
        lines.append(
            [
                spec.name,
                str(own),
                f"{own / len(total):.1%}",
                f"{distinct[task_id]} of {sizes[task_id]}",
                f"{sizes[task_id] / len(rows):.1%}",
            ]
        )
    rule = type(data.sampling).__name__
    steps = len(sampler) // sampler.accumulation
    return (
        f"Mix of the first {batches} batches of {data.batch_size} "
        f"({rule}, {data.sampling.batches}; an epoch has {steps} steps)\n" + _columns(lines)
    )


def _columns(lines: list[list[str]]) -> str:
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )
