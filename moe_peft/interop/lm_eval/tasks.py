"""Task folders as lm-eval's tasks: the template is translated, the rows stay where they are."""

import json
from collections.abc import Sequence
from pathlib import Path
from string import Formatter
from typing import Any

import yaml

from moe_peft.data.jsonl import read_rows
from moe_peft.data.sources import TaskFolder
from moe_peft.data.tasks import Split, TaskSpec, repeated, template_fields
from moe_peft.interop.folder import new_folder

MAY_LACK = ("text_pair", "keyword")
"""Columns that are empty where a row lacks them."""
AROUND = r"(?<!\S)[.,;:!?\"'`()\[\]{}]+|[.,;:!?\"'`()\[\]{}]+(?!\S)"
"""Punctuation around words."""
ARTICLES = r"(?i)(?<!\S)(a|an|the)(?=\s+\S)|(?<=\S)\s+(a|an|the)(?!\S)"
"""Articles beside other words."""
BLANKS = r"^\s+|\s+(?=\s|$)"
"""Blanks at the ends, and all but one between words."""


def write_tasks(folders: Sequence[str | Path], out: str | Path, split: Split = "test") -> list[str]:
    """Writes a YAML for every task folder into a new folder; lm-eval's `--tasks` takes the files.

    Args:
        folders: task folders (see `TaskFolder`).
        out: the folder to write; no such path yet, or an empty folder.
        split: whose rows are asked.

    Returns:
        A line about every file.

    Raises:
        ValueError: a folder that is no task, lacks the split or wants numbers, two tasks of one file name, or a path
            that is taken.
    """
    sources = [TaskFolder(str(folder), equal_options="drop") for folder in folders]
    names = [f"{source.spec().name.replace('/', '_')}.yaml" for source in sources]
    twice = repeated(names)
    if twice is not None:
        raise ValueError(f"two folders hold a task of which '{twice}' would be written; leave one out")
    texts: dict[str, str] = {}
    lines = []
    for name, source in zip(names, sources, strict=True):
        texts[name] = yaml.safe_dump(task_config(source, split), sort_keys=False, allow_unicode=True)
        kept, asked = len(source.rows(split)), sum(1 for _ in read_rows(source.file(split)))
        equal = f"; {asked - kept} with two equal options, which `equal_options: drop` leaves out" * (asked > kept)
        lines.append(f"{Path(out) / name}: {asked} rows of {source.file(split)}{equal}")
    with new_folder(out) as new:
        for name, text in texts.items():
            (new / name).write_text(text, encoding="utf-8")
    return lines


def task_config(source: TaskFolder, split: Split) -> dict[str, Any]:
    """Returns a task folder as lm-eval's configuration of a task.

    Raises:
        ValueError: a task that asks for numbers, or a template that Jinja cannot say.
    """
    spec = source.spec()
    if spec.kind == "regression":
        raise ValueError(f"task '{spec.name}' asks for numbers, which lm-eval has no metric for; leave it out")
    return {
        "task": spec.name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {split: str(source.file(split).resolve())}},
        "test_split": split,
        "doc_to_text": jinja(spec.template),
        **(_ranked(spec) if spec.has_options else _written()),
        "metadata": {"version": 1.0},
    }


def _ranked(spec: TaskSpec) -> dict[str, Any]:
    """Options ranked by their summed log-likelihood (`acc`), and by that per character (`acc_norm`)."""
    names = ["acc", "acc_norm"]
    if "matthews" in spec.metric.split("/"):
        names.append("mcc")
    if "f1" in spec.metric.split("/") and len(spec.choices) == 2:  # lm-eval's is the F1 of class 1
        names.append("f1")
    aggregation = {"mcc": "matthews_corrcoef", "f1": "f1"}
    return {
        "output_type": "multiple_choice",
        "doc_to_choice": "choices",
        "doc_to_target": "label",
        "target_delimiter": " ",
        "metric_list": [
            {"metric": name, "aggregation": aggregation.get(name, "mean"), "higher_is_better": True} for name in names
        ],
    }


def _written() -> dict[str, Any]:
    """Text, as long as our own test has it by default, compared as `metrics.normalise_answer` does."""
    return {
        "output_type": "generate_until",
        "doc_to_target": "target",
        "generation_kwargs": {"until": [], "do_sample": False, "max_gen_toks": 16},
        "metric_list": [
            {
                "metric": "exact_match",
                "aggregation": "mean",
                "higher_is_better": True,
                "ignore_case": True,
                "regexes_to_ignore": [AROUND, ARTICLES, BLANKS],
            }
        ],
    }


def jinja(template: str) -> str:
    """Translates a template of braces into one of Jinja's.

    Raises:
        ValueError: a template that is no task's, or a field with a format.
    """
    fields = template_fields(template)
    if template in [f"{{{field}}}" for field in fields]:
        return fields[0]  # a column alone: lm-eval would take a rendered text of digits for a number
    parts = []
    for literal, field, form, conversion in Formatter().parse(template):
        # A brace could open an expression of Jinja's.
        parts.append(f"{{{{ {json.dumps(literal)} }}}}" if "{" in literal else literal)
        if form or conversion:
            raise ValueError(f"template {template!r} formats {{{field}}}, which has no like in Jinja; name it alone")
        if field is not None:
            parts.append(f"{{{{ {field} | default('', true) }}}}" if field in MAY_LACK else f"{{{{ {field} }}}}")
    return "".join(parts)
