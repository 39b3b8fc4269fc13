"""README.md of an exported folder: what it is of, what it was measured to do, and code that loads it.

The front matter is what a Hugging Face hub reads. The base is named there only where its name can be a hub id: a hub
refuses a card that names something else. No licence is named, because none is known.
"""

import json
import re
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from moe_peft import __version__
from moe_peft.backbones import Backbone
from moe_peft.interop.heads import own_head
from moe_peft.interop.origin import Origin
from moe_peft.methods.base import MultitaskModule
from moe_peft.methods.merging import task_number

LIBRARIES = {"peft": "peft", "merged": "transformers"}
"""What loads an export; our own package the others."""
WHAT = {
    "peft": "A LoRA in Hugging Face PEFT's files",
    "merged": "A plain model with the adapter folded into its weights",
    "expert": "A tensor-train expert by itself",
    "adapter": "A trained adapter, whole: routers, factors, heads and all",
}


class Place(NamedTuple):
    """Where a reader of the card finds the folder."""

    folder: str = "."
    """This folder, or the id of its repository on a hub."""
    subfolder: str = ""
    """Within the repository."""


def write_card(
    module: MultitaskModule, folder: Path, to: str, name: str, findings: Sequence[str], origin: Origin, place: Place
) -> None:
    """Writes README.md into an exported folder.

    Args:
        module: where it comes from.
        folder: where it lies.
        to: which form it has.
        name: the task, the cluster, or "" for an adapter of all tasks.
        findings: what comparing it with the module found, and what an approximation was rated to be.
        origin: its run.
        place: where a reader will find it.
    """
    names = [spec.name for spec in module.specs]
    tasks = [name] if name in names else names
    nearly = ", an approximation of the routed method (see below)" if len(findings) > 1 else ""
    title = f"{type(module).__name__}{f', {name},' if name else ''} on {module.backbone.name}"
    parts = [
        _front_matter(module, to),
        f"# {title}",
        f"{WHAT[to]}{nearly}, exported by moe_peft {__version__}.",
        "## Base",
        _base(module),
        "## Tasks and data",
        _tasks(module, tasks, origin),
        "## Results",
        _results(origin.results, tasks),
        "## How it was checked",
        "\n".join(f"- {line}" for line in findings),
        "## Loading it",
        _loading(module, to, name, place),
        "## Versions",
        ", ".join(f"{package} {number}" for package, number in _versions().items()) + ".",
    ]
    (folder / "README.md").write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")


def write_index(folder: Path, to: str, names: dict[str, str], module: MultitaskModule) -> None:
    """Writes README.md of a folder that holds one export per task.

    Args:
        folder: where it lies.
        to: which form they have.
        names: sub-folder by task or cluster.
        module: where they come from.
    """
    lines = [f"- [{name}]({sub})" for name, sub in names.items()]
    title = f"# {type(module).__name__} on {module.backbone.name}"
    text = f"{WHAT[to]} each, exported by moe_peft {__version__}; every folder has a card of its own:"
    content = [_front_matter(module, to), title, text, "\n".join(lines)]
    (folder / "README.md").write_text("\n\n".join(content) + "\n", encoding="utf-8")


def _front_matter(module: MultitaskModule, to: str) -> str:
    about: dict[str, Any] = {"base_model": module.backbone.name} if hub_id(module.backbone) else {}
    about |= {"library_name": LIBRARIES.get(to, "moe_peft"), "tags": ["moe_peft", type(module).__name__.lower()]}
    if to == "peft":
        about["tags"].append("lora")
    return f"---\n{yaml.safe_dump(about, sort_keys=False)}---"


def hub_id(backbone: Backbone) -> bool:
    """Whether a backbone's name can be read as a hub id: it is no folder here, and nothing out of a package or file."""
    known = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", backbone.name) is not None
    return known and backbone.gguf_file is None and not Path(backbone.name).exists() and not backbone.random_weights


def _base(module: MultitaskModule) -> str:
    backbone = module.backbone
    dtype = str(backbone.dtype).removeprefix("torch.")
    revision = f", revision {backbone.revision}" if backbone.revision else ""
    return (
        f"`{backbone.name}`{revision} ({type(backbone).__name__}, {dtype}), kept frozen. Fingerprint of its weights: "
        f"`{module.fingerprint}`."
    )


def _tasks(module: MultitaskModule, tasks: Sequence[str], origin: Origin) -> str:
    lines = [["task", "kind", "metric", "prompt", "rows of train / validation / test"]]
    for spec in module.specs:
        if spec.name in tasks:
            prompt = json.dumps(spec.template, ensure_ascii=False)
            lines.append([spec.name, spec.kind, spec.metric, f"`{prompt}`", _counts(origin, spec.name)])
    return _table(lines)


def _counts(origin: Origin, task: str) -> str:
    """Returns how many rows each split of a task has, if its files are in reach, and what must be said of them."""
    for spec, source in zip(origin.data.specs, origin.data.sources, strict=True) if origin.data else ():
        if spec.name == task:
            counts = []
            for split in ("train", "validation", "test"):
                try:
                    counts.append(str(len(source.rows(split))))
                except (ValueError, OSError):
                    counts.append("?")
            return " / ".join(counts) + (f" ({source.note})" if source.note else "")
    return "not in reach of the export"


def _results(results: dict[str, Any] | None, tasks: Sequence[str]) -> str:
    """Returns the test's table for the tasks, in points."""
    rows = {name: row["tasks"] for name, row in (results or {}).get("rows", {}).items() if isinstance(row, dict)}
    known = [task for task in tasks if task in rows.get("model", {})]
    if not known:
        return "The run left no results of a test."
    lines = [["", *(f"{task} {rows['model'][task]['metric']}" for task in known)]]
    lines += [[name, *(_cell(row.get(task)) for task in known)] for name, row in rows.items()]
    return (
        f"{_table(lines)}\n\nPoints ± one standard error, on the run's test rows; `model` is the trained one, routed."
    )


def _cell(score: dict[str, Any] | None) -> str:
    return "n/a" if score is None else f"{100 * score['value']:.1f} ±{100 * score['stderr']:.1f}"


def _table(lines: list[list[str]]) -> str:
    """Returns Markdown's table; its first line is the header."""
    escaped = [[cell.replace("|", "\\|") for cell in cells] for cells in lines]
    header, *others = [f"| {' | '.join(cells)} |" for cells in escaped]
    return "\n".join([header, f"|{'---|' * len(lines[0])}", *others])


def _versions() -> dict[str, str]:
    found = {"moe_peft": __version__}
    for package in ("torch", "transformers", "peft"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _loading(module: MultitaskModule, to: str, name: str, place: Place) -> str:
    if to == "expert":
        return (
            "As an expert of a mixture: `python tools/add_expert.py RUN --expert FOLDER --task TASK --out NEW_RUN`,"
            " or among `expert_paths` of the callback `FreezeThenRoute`."
        )
    where = repr(place.folder) + (f", subfolder={place.subfolder!r}" if place.subfolder else "")
    auto, base, task = module.backbone.auto_class, _load_base(module.backbone), module.specs[0].name
    code = {
        "peft": [
            "from peft import PeftModel",
            *base,
            f"model = PeftModel.from_pretrained(base, {where})",
        ],
        "merged": [
            f"from transformers import {auto}, AutoTokenizer",
            "",
            f"model = {auto}.from_pretrained({where})",
            f"tokenizer = AutoTokenizer.from_pretrained({where})",
        ],
        "adapter": [
            "import moe_peft",
            *base,
            f"model = moe_peft.load_adapter(base, {where})",
            f"with model.routing(tasks={task!r}):  # or a list, one task per row",
            "    ...  # model(**inputs), model.generate(**inputs)",
        ],
    }[to]
    block = "```python\n" + "\n".join(code) + "\n```"
    names = [spec.name for spec in module.specs]
    head = own_head(module, task_number(module, name)) if to != "adapter" and name in names else None
    if head is None:
        return block
    return (
        f"{block}\n\nThe model is bare. The task's head lies beside it in `head.safetensors` (weight [C, D], bias [C]) "
        f"and `head.json`: it reads the last hidden state, pooled by {head.pooling!r}, and its outputs are "
        f"{', '.join(head.choices) or 'the value'}."
    )


def _load_base(backbone: Backbone) -> list[str]:
    """Returns code that loads a base: by transformers, or by this package where it comes out of other files."""
    if backbone.gguf_file is None and not backbone.name.startswith("package:"):
        revision = f", revision={backbone.revision!r}" if backbone.revision else ""
        return [
            f"from transformers import {backbone.auto_class}",
            "",
            f"base = {backbone.auto_class}.from_pretrained({backbone.name!r}{revision})",
        ]
    given = {"gguf_file": backbone.gguf_file, "sha256": backbone.sha256, "revision": backbone.revision}
    more = "".join(f", {name}={value!r}" for name, value in given.items() if value is not None)
    name = type(backbone).__name__
    return [f"from moe_peft.backbones import {name}", "", f"base = {name}({backbone.name!r}{more}).load()"]
