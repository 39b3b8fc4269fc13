"""What a mixture really is, before any training: rows, filled-in templates, lengths, truncation, the mix drawn."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from jsonargparse import ArgumentError, ArgumentParser

from moe_peft.backbones import Backbone
from moe_peft.data.encoding import EncodedRow
from moe_peft.data.module import MultitaskDataModule
from moe_peft.data.splits import content
from moe_peft.data.tasks import SPLITS, TaskSpec


def load_data_module(configs: list[Path]) -> MultitaskDataModule:
    """Makes the data module of a run's configuration files; of the model section only the backbone is read.

    Args:
        configs: YAML files as `python -m moe_peft fit` takes them; later ones overlay earlier ones.

    Raises:
        ValueError: A file that is missing or no YAML mapping, no data section, no backbone, or bad arguments.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(MultitaskDataModule, "data", required=True)
    parser.add_argument("--backbone", type=Backbone, required=True)
    parser.link_arguments("backbone", "data.init_args.backbone")
    try:
        config = parser.parse_object(_merged(configs))
    except ArgumentError as error:
        lines = [line.strip(" -") for line in str(error).splitlines()]
        telling = next((line for line in lines if "not accepted" in line or "Option" in line), lines[0])
        raise ValueError(f"--config {configs[-1]}: {telling}") from None
    return parser.instantiate_classes(config)["data"]


def _merged(configs: list[Path]) -> dict[str, Any]:
    """Overlays the sections that matter; a list replaces a list, `name+` appends to it."""
    merged: dict[str, Any] = {}
    for config in configs:
        try:
            content = yaml.safe_load(config.read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError) as error:
            raise ValueError(f"--config {config}: {str(error).splitlines()[0]}; give a readable YAML file.") from None
        if not isinstance(content, dict):
            raise ValueError(f"--config {config} holds no mapping; give trainer, model and data sections.")
        model = content.get("model") or {}
        backbone = (model.get("init_args") or model).get("backbone")
        sections = {"data": content.get("data"), "backbone": backbone}
        _overlay(merged, {name: section for name, section in sections.items() if section is not None})
    for name, section in (("data", "data"), ("backbone", "model.init_args.backbone")):
        if name not in merged:
            raise ValueError(f"no --config file has {section}; add one that has.")
    return merged


def _overlay(below: dict[str, Any], above: dict[str, Any]) -> None:
    for key, value in above.items():
        if key.endswith("+"):
            below[key[:-1]] = [*below.get(key[:-1], []), *value]
        elif isinstance(value, dict) and isinstance(below.get(key), dict) and _same_class(below[key], value):
            _overlay(below[key], value)
        else:
            below[key] = value


def _same_class(below: dict[str, Any], above: dict[str, Any]) -> bool:
    """Arguments of another class must not leak into this one."""
    return above.get("class_path", below.get("class_path")) == below.get("class_path")


def describe_mix(configs: list[Path], batches: int) -> str:
    """Describes the mixture of a run's configuration files; see `load_data_module` and `preview`."""
    return preview(load_data_module(configs), batches)


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
