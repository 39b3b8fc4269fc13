"""One task's export, or every task's, with the proof of what was written (the logic of `tools/export.py`)."""

import contextlib
import logging
import re
from collections import Counter
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from moe_peft.interop.adapter_folder import write_adapter
from moe_peft.interop.approximate import By, Static, calibrate, held, reads_input
from moe_peft.interop.card import Place, write_card, write_index
from moe_peft.interop.experts import expert_parity, export_expert
from moe_peft.interop.folder import new_folder, refuse_taken
from moe_peft.interop.merged import export_merged
from moe_peft.interop.origin import Origin, spread
from moe_peft.interop.parity import Parity, adapter_parity, parity, random_rows, text_rows
from moe_peft.interop.peft import export_peft
from moe_peft.interop.rating import rate
from moe_peft.methods.base import MultitaskModule
from moe_peft.methods.merging import task_number

logger = logging.getLogger(__name__)
ALL = "all"
"""The word for every task, unless a task is called so."""
To = Literal["peft", "merged", "expert", "adapter"]
ROWS = 8
"""Validation rows of a task that outputs are compared on."""
CALIBRATION = 100
"""Training rows of a task that a static core is the mean over, and as many validation rows that it is rated on."""


class Exported(NamedTuple):
    """A task's export: where it lies, and what comparing it with the module found."""

    folder: Path
    task: str
    """The task, the cluster, or "" for all tasks together."""
    parity: Parity
    how: str
    """On what it was compared, and in which dtype."""
    what: str = "outputs"
    """What was compared."""
    approximation: str = ""
    """Of what, and how good, where the routed method itself is something else."""

    def __str__(self) -> str:
        """Returns a line with the largest difference, and one about the approximation, if it is one."""
        whose = f"task {self.task!r}, " if self.task else ""
        lines = [f"{self.folder}: {whose}{self.finding()}", *([self.approximation] if self.approximation else [])]
        return "\n  ".join(lines)

    def finding(self) -> str:
        """Returns what the comparison of the file with the module found."""
        found = self.parity
        return (
            f"largest difference {found.difference:.1e} of {self.what} up to {found.largest:.1f} ({self.how}, read "
            f"back with {found.reader})"
        )


class Part(NamedTuple):
    """One folder to write."""

    name: str
    """The task, the cluster, or "" for all tasks together."""
    task: int
    """Whose factors and head."""
    static: Static | None = None
    """What stands for a routing that depends on the input."""


def export(
    module: MultitaskModule,
    to: To,
    task: str | None,
    out: Path,
    uniform_rank: bool = False,
    texts: list[str] | None = None,
    origin: Origin | None = None,
    approximate: By | None = None,
    rows: int | None = None,
    repo_id: str | None = None,
) -> list[Exported]:
    """Writes the export, reads it back and compares; a card lies in every folder.

    Args:
        module: a trained module, not merged.
        to: "peft" (an ordinary LoRA), "merged" (a plain model folder), "expert" (a tensor-train expert by itself) or
            "adapter" (the method whole, for `moe_peft.load_adapter`).
        task: a task's name, or "all" for a sub-folder per task; None for an adapter, and for clusters.
        out: the folder to write; no such path yet, or an empty folder.
        uniform_rank: see `export_peft`.
        texts: what to compare on; None takes validation rows of the task, or random token ids where the run's data are
            out of reach.
        origin: the run.
        approximate: a static LoRA instead of a routing that depends on the input, per "task" or semantic "cluster";
            None refuses such a method.
        rows: see `CALIBRATION`.
        repo_id: where it will be pushed, for the card.

    Returns:
        What was written, by task, and the largest difference of its outputs (an expert or adapter: of its numbers,
        which must be equal to the bit) from the module's. The files stay, however large it is (see `unfaithful`).

    Raises:
        ValueError: an argument that does not fit, before anything is written.
    """
    origin = origin or Origin()
    _refuse(module, to, task, uniform_rank, texts, approximate, rows)
    refuse_taken(out)
    given = text_rows(module, texts) if texts else []
    parts = _parts(module, to, task, origin, approximate, rows or CALIBRATION)
    several = (task == ALL and task not in _names(module)) or approximate == "cluster"
    subs = {part.name: re.sub(r"[^\w.-]", "_", part.name) if several else "" for part in parts}
    if len(set(subs.values())) < len(subs):
        raise ValueError(f"task: the folders of {', '.join(subs)} would have one name; export them one by one")
    done = []
    with new_folder(out) as new:
        for part in parts:
            if several:
                logger.info("writing and checking %s", part.name)
            target, place = new / subs[part.name], Place(repo_id, subs[part.name]) if repo_id else Place()
            with held(module, part.static.cores) if part.static else contextlib.nullcontext():
                _write(module, to, target, part, uniform_rank)
                found = _compare(module, to, target, part, given, origin)
            each = found._replace(folder=out / subs[part.name], approximation=_approximation(module, part, origin))
            findings = [each.finding(), *([each.approximation] if each.approximation else [])]
            write_card(module, target, to, part.name, findings, origin, place)
            done.append(each)
        if several:
            write_index(new, to, subs, module)
    return done


def unfaithful(exports: list[Exported]) -> str | None:
    """Names the exports that do not compute what the module does, in one line; None where all do."""
    wrong = [each for each in exports if not each.parity.faithful]
    if not wrong:
        return None
    return (
        f"{', '.join(str(each.folder) for each in wrong)}: the {wrong[0].what} differ from the trained module's by "
        f"more than {wrong[0].parity.tolerance:g} of the largest; the files stay, but do not use them"
    )


def _refuse(
    module: MultitaskModule,
    to: To,
    task: str | None,
    uniform_rank: bool,
    texts: list[str] | None,
    approximate: By | None,
    rows: int | None,
) -> None:
    """Refuses arguments that contradict each other or the method."""
    if uniform_rank and to != "peft":
        raise ValueError(f"uniform_rank: {to} has no such form; use it with peft")
    if texts and to in ("expert", "adapter"):
        raise ValueError(f"text: of an {to} numbers are compared, not outputs; leave it out")
    whole = "an adapter holds all tasks" if to == "adapter" else "a cluster holds rows of all tasks"
    if task is not None and (to == "adapter" or approximate == "cluster"):
        raise ValueError(f"task: {whole}; leave task {task!r} out")
    if task is None and to != "adapter" and approximate != "cluster":
        raise ValueError(f"task: {to} is written of one task; name one of {', '.join(_names(module))}, or all")
    if rows is not None and (rows < 1 or approximate is None):
        raise ValueError(f"rows: {rows} is of no use; give 1 or more, with approximate")
    if to in ("expert", "adapter"):
        if approximate is not None:
            raise ValueError(f"approximate: an {to} is exact; leave it out")
        return
    dynamic = reads_input(module)
    if approximate is not None and not dynamic:
        raise ValueError(f"approximate: a {type(module).__name__} is exported exactly; leave it out")
    if dynamic and approximate is None:
        raise ValueError(
            f"to: {type(module).__name__} cannot be merged or exported as a LoRA: its cores depend on the input; use "
            "--approximate task (or cluster) for their mean over real rows, with its error told, or --to adapter"
        )


def _names(module: MultitaskModule) -> list[str]:
    return [spec.name for spec in module.specs]


def _parts(
    module: MultitaskModule, to: To, task: str | None, origin: Origin, approximate: By | None, rows: int
) -> list[Part]:
    """Returns the folders to write."""
    if to == "adapter":
        return [Part("", 0)]
    names = _names(module)
    tasks = names if task == ALL and task not in names else [] if task is None else [task]
    numbers = {name: task_number(module, name) for name in tasks}
    if approximate is None:
        return [Part(name, number) for name, number in numbers.items()]
    return [Part(each.name, each.task, each) for each in calibrate(module, origin, approximate, tasks, rows)]


def _write(module: MultitaskModule, to: To, folder: Path, part: Part, uniform_rank: bool) -> None:
    if to == "adapter":
        write_adapter(module, folder)
    elif to == "expert":
        export_expert(module, folder, part.task)
    elif to == "merged":
        export_merged(module, folder, part.task)
    else:
        export_peft(module, folder, part.task, uniform_rank, part.name)


def _compare(
    module: MultitaskModule, to: To, folder: Path, part: Part, texts: list[Tensor], origin: Origin
) -> Exported:
    """Reads a folder back; where it will lie is not known here."""
    if to in ("expert", "adapter"):
        found = adapter_parity(module, folder) if to == "adapter" else expert_parity(module, folder, part.task)
        return Exported(folder, part.name, found, "bit for bit", "numbers")
    rows, words = (texts, "text") if texts else _rows(module, part, origin)
    dtype = str(module.backbone.dtype).removeprefix("torch.")
    return Exported(folder, part.name, parity(module, folder, part.task, rows), f"{dtype}, {len(rows)} rows of {words}")


def _rows(module: MultitaskModule, part: Part, origin: Origin) -> tuple[list[Tensor], str]:
    """Returns token ids [1, S] to compare outputs on, and what they are."""
    if origin.data is None:
        return random_rows(module), "random token ids"
    if part.static is None:
        own, words = origin.rows("validation", part.name, ROWS), "validation data"
    else:
        own = spread(part.static.held_out or part.static.calibrated, ROWS)
        words = "validation data" if part.static.held_out else "training data"
    return [torch.tensor([row.prompt + row.answer]) for row in own], words


def _approximation(module: MultitaskModule, part: Part, origin: Origin) -> str:
    """Says what an approximate export is made of, and how good it is."""
    static = part.static
    if static is None:
        return ""
    assert origin.data is not None
    names = _names(module)
    counts = Counter(names[row.task_id] for row in static.calibrated)
    rows = ", ".join(f"{count} of {name}" for name, count in counts.items())
    rating = rate(module, static, origin.data)
    how = "no validation rows to rate it on" if rating is None else str(rating)
    return f"approximate: the mean of the routing over {len(static.calibrated)} training rows ({rows}); {how}"
