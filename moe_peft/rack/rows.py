"""The rows of a comparison, resolved: each method's configuration with every default, its size, its tasks."""

import hashlib
import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from jsonargparse import Namespace

from moe_peft.budget import adapter_parameters, class_of, fit_budget
from moe_peft.data.sources import TaskFolder, TaskSource
from moe_peft.data.tasks import SPLITS
from moe_peft.rack.settings import Comparison, Entry, merged
from moe_peft.reporting.comparison import ASIDE, ASIDE_OF_TRAINER


class Row(NamedTuple):
    """One of the methods, resolved."""

    tag: str
    method: str
    """The class."""
    files: tuple[Path, ...]
    overlay: dict[str, Any]
    """Laid over the files: what is common, what is this row's own, its size."""
    identity: dict[str, Any]
    """What decides over the result, but for seed and learning rate."""
    parameters: int
    """Trainable ones of the adapters."""
    sources: list[TaskSource]

    @property
    def tasks(self) -> list[str]:
        """The names of the tasks."""
        return [source.spec().name for source in self.sources]


def resolve(comparison: Comparison, entry: Entry, budget: int | None, more: Sequence[str]) -> Row:
    """Resolves one of the methods: its configuration with all defaults, its size, its tasks.

    Args:
        comparison: whose.
        entry: the method.
        budget: parameters of the adapters, if they are to be so many.
        more: further arguments of the command line.

    Raises:
        ValueError: a budget that the method cannot have, or no such tasks.
    """
    files = (comparison.base, comparison.data, entry.file)
    overlay = merged(comparison.common, entry.overlay)
    parsed = parse(files, overlay, more)
    sources = sources_of(parsed)
    method = class_of(parsed.model.class_path)
    model_only = [argument for argument in more if argument.startswith("--model")]
    with written(overlay) as laid:
        arguments = [f"--config={file}" for file in (comparison.base, entry.file, laid)] + model_only
        if budget is None or not entry.sized or not method.sized_by:
            parameters = adapter_parameters(arguments, len(sources))
        else:
            fitted = fit_budget(arguments, budget, len(sources))
            parameters = fitted.form.parameters
            overlay = merged(overlay, {"model": {"init_args": fitted.form.arguments}})
            parsed = parse(files, overlay, more)
    if comparison.rates is not None and "lr" not in rate_of(parsed):
        raise ValueError(
            f"methods: {entry.tag!r} has no optimizer whose rate could be chosen; add model.init_args.optimizer to it"
        )
    return Row(entry.tag, method.__name__, files, overlay, identity(parsed, sources), parameters, sources)


def parse(files: Sequence[Path], overlay: dict[str, Any], more: Sequence[str]) -> Namespace:
    """Parses a run's model, data and trainer sections as `fit` will."""
    from moe_peft.memory import run_parser

    with written(overlay) as laid:
        return run_parser().parse_args([*(f"--config={file}" for file in (*files, laid)), *more])


@contextmanager
def written(config: dict[str, Any]) -> Iterator[str]:
    """Within: a configuration as a file."""
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(yaml.safe_dump(config))
        file.flush()
        yield file.name


def rate_of(parsed: Namespace) -> dict[str, Any]:
    """The optimizer's own arguments."""
    optimizer = parsed.model.init_args.optimizer
    return dict(getattr(optimizer, "init_args", None) or {})


def sources_of(parsed: Namespace) -> list[TaskSource]:
    """Makes the tasks' sources, which read nothing but names."""
    arguments = parsed.data.init_args
    root = Path(arguments.root or "").expanduser()
    found = []
    for task in arguments.tasks:
        own = TaskFolder(task) if isinstance(task, str) else class_of(task.class_path)(**task.init_args.as_dict())
        found.append(own.under(root))
    return found


def identity(parsed: Namespace, sources: Sequence[TaskSource]) -> dict[str, Any]:
    """Returns what decides over a result, but for seed and rate: no places, but the bytes of task folders."""
    config = {name: value for name, value in parsed.as_dict().items() if name not in ASIDE and name != "config"}
    config["trainer"] = {key: value for key, value in config["trainer"].items() if key not in ASIDE_OF_TRAINER}
    data = config["data"] = dict(config["data"])
    data["init_args"] = {key: value for key, value in data["init_args"].items() if key not in ("root", "num_workers")}
    files = [file for source in sources if isinstance(source, TaskFolder) for file in files_of(source)]
    return config | {"files": [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]}


def files_of(source: TaskFolder) -> list[Path]:
    """The files of a task folder."""
    return [source.path / "task.json", *(source.file(split) for split in SPLITS)]


def digest(row: Row, seed: int, rate: float | None) -> str:
    """Returns the hash of all that decides over a fit."""
    content = row.identity | {"seed": seed, "rate": rate}
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()
