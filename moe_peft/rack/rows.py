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
from moe_peft.memory import run_parser
from moe_peft.rack.identity import identity
from moe_peft.rack.settings import Comparison, Entry, merged
from moe_peft.trainer_checks import refuse_unsupported

OWN = ("--config", "--ckpt_path", "--seed_everything", "--trainer.default_root_dir")
"""Arguments of the command line that are the comparison's to give."""
SPEED = ("attention", "gradient_checkpointing")
"""Arguments of a backbone that change its speed and memory alone."""
MONITOR = "val/mean"
"""What a learning rate is chosen by."""


class Row(NamedTuple):
    """One of the methods, resolved."""

    tag: str
    method: str
    """The class."""
    files: tuple[Path, ...]
    overlay: dict[str, Any]
    """Laid over the files: what is common, what is this row's own. The command line stands above it."""
    decided: dict[str, Any]
    """Laid over all else: the size that the budget gives it."""
    identity: dict[str, Any]
    """What decides over the result, but for seed and learning rate."""
    parameters: int
    """Trainable ones of the adapters."""
    sources: list[TaskSource]
    base: str
    """The backbone's name."""

    @property
    def tasks(self) -> list[str]:
        """The names of the tasks."""
        return [source.spec().name for source in self.sources]

    @property
    def backbone(self) -> dict[str, Any]:
        """What decides over the base's answers: its class and arguments, but for how fast it computes."""
        own = self.identity["model"]["init_args"]["backbone"]
        return own | {"init_args": {name: value for name, value in own["init_args"].items() if name not in SPEED}}

    @property
    def ranking(self) -> str:
        """How options are ranked."""
        return self.identity["model"]["init_args"]["ranking"]

    @property
    def taken(self) -> tuple:
        """What decides which rows of the tasks are taken, and tested: the tasks' own arguments, and the limit."""
        data, limit = self.identity["data"]["init_args"], self.identity["trainer"].get("limit_test_batches")
        return data["tasks"], limit, None if limit is None else data["eval_batch_size"]


def resolve(comparison: Comparison, entry: Entry, budget: int | None, more: Sequence[str]) -> Row:
    """Resolves one of the methods: its configuration with all defaults, its size, its tasks.

    Args:
        comparison: whose.
        entry: the method.
        budget: parameters of the adapters, if they are to be so many.
        more: further arguments of the command line, each in one word.

    Raises:
        ValueError: a budget that the method cannot have, no such tasks, a batch that the sampling cannot fill from
            them, or a trainer that would train something else.
    """
    files = (comparison.base, comparison.data, entry.file)
    overlay, decided = merged(comparison.common, entry.overlay), {}
    parsed = parse(files, overlay, more)
    sources = sources_of(parsed)
    refuse_unsupported(parsed.trainer)
    refuse_unmixable(parsed, sources)
    method = class_of(parsed.model.class_path)
    if budget is None or not entry.sized or not method.sized_by:
        parameters = adapter_parameters(parsed, len(sources))
    else:
        form = fit_budget(parsed, budget, len(sources)).form
        parameters, decided = form.parameters, {"model": {"init_args": form.arguments}}
        for name, value in form.arguments.items():
            parsed.model.init_args[name] = value
    if comparison.rates is not None:
        refuse_without_choice(parsed)
    known, base = identity(parsed, sources), str(parsed.model.init_args.backbone.init_args.name)
    return Row(entry.tag, method.__name__, files, overlay, decided, known, parameters, sources, base)


def parse(
    files: Sequence[Path], overlay: dict[str, Any], more: Sequence[str], decided: dict[str, Any] | None = None
) -> Namespace:
    """Parses a run's model, data, trainer and checkpoint sections as `fit` will, the last argument on top."""
    with written(overlay) as laid, written(decided or {}) as last:
        below = [f"--config={file}" for file in (*files, laid)]
        return run_parser().parse_args([*below, *more, f"--config={last}"])


def in_one_word(more: Sequence[str]) -> tuple[str, ...]:
    """Returns arguments of the command line as --name=value each.

    Raises:
        ValueError: one that is the comparison's own to give.
    """
    words: list[str] = []
    for word in more:
        if words and not word.startswith("--") and "=" not in words[-1]:
            words[-1] += f"={word}"
        else:
            words.append(word)
    for word in words:
        name = word.partition("=")[0]
        if name in OWN:
            raise ValueError(f"{name}: a comparison gives every fit its own; leave it out, or change the YAML")
    return tuple(words)


def refuse_without_choice(parsed: Namespace) -> None:
    """Raises one line if there is no learning rate to choose, or nothing to choose it by."""
    if "lr" not in given_to(parsed.model.init_args.optimizer):
        raise ValueError("there is no optimizer whose rate could be chosen; add model.init_args.optimizer")
    monitor, mode = parsed.checkpoint.monitor, parsed.checkpoint.mode
    if (monitor, mode) != (MONITOR, "max"):
        raise ValueError(
            f"checkpoint.monitor: {monitor!r} ({mode}) does not tell which learning rate is the best; use {MONITOR} "
            "(max), or leave learning_rates out"
        )


def refuse_unmixable(parsed: Namespace, sources: Sequence[TaskSource]) -> None:
    """Raises one line if the sampling cannot fill a batch from the tasks; no row is read for it."""
    data = parsed.data.init_args
    if data.sampling is not None:
        names = [source.spec().name for source in sources]
        sampling = class_of(data.sampling.class_path)(**given_to(data.sampling))
        sampling.plan(names, [1] * len(names), data.batch_size, steps=1, seed=0, epoch=0)


@contextmanager
def written(config: dict[str, Any]) -> Iterator[str]:
    """Within: a configuration as a file."""
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(yaml.safe_dump(config))
        file.flush()
        yield file.name


def given_to(subclass: Namespace | None) -> dict[str, Any]:
    """The arguments of a class that is named in a configuration; it may have none."""
    return dict(getattr(subclass, "init_args", None) or {})


def sources_of(parsed: Namespace) -> list[TaskSource]:
    """Makes the tasks' sources, which read nothing but names."""
    arguments = parsed.data.init_args
    root = Path(arguments.root or "").expanduser()
    found = []
    for task in arguments.tasks:
        own = TaskFolder(task) if isinstance(task, str) else class_of(task.class_path)(**task.init_args.as_dict())
        found.append(own.under(root))
    return found


def digest(row: Row, seed: int, rate: float | None) -> str:
    """Returns the hash of all that decides over a fit."""
    content = row.identity | {"seed": seed, "rate": rate}
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()
