"""One task's export, or every task's, with the proof of what was written (the logic of `tools/export.py`)."""

import re
from pathlib import Path
from typing import Literal, NamedTuple

from moe_peft.interop.experts import expert_parity, export_expert
from moe_peft.interop.folder import new_folder
from moe_peft.interop.merged import export_merged
from moe_peft.interop.parity import Parity, parity, random_rows, text_rows
from moe_peft.interop.peft import export_peft
from moe_peft.methods.base import MultitaskModule

ALL = "all"
"""The word for every task, unless a task is called so."""


class Exported(NamedTuple):
    """A task's export: where it lies, and what comparing it with the module found."""

    folder: Path
    task: str
    parity: Parity
    how: str
    """On what it was compared, and in which dtype."""
    what: str = "outputs"
    """What was compared."""

    def __str__(self) -> str:
        """Returns a line with the largest difference."""
        found = self.parity
        return (
            f"{self.folder}: task {self.task!r}, largest difference {found.difference:.1e} of {self.what} up "
            f"to {found.largest:.1f} ({self.how}, read back with {found.reader})"
        )


def export(
    module: MultitaskModule,
    to: Literal["peft", "merged", "expert"],
    task: str,
    out: Path,
    uniform_rank: bool = False,
    texts: list[str] | None = None,
) -> list[Exported]:
    """Writes the export, reads it back and compares.

    Args:
        module: a trained module, not merged.
        to: "peft" (an ordinary LoRA), "merged" (a plain model folder) or "expert" (a tensor-train expert by itself).
        task: a task's name, or "all" for a sub-folder per task.
        out: the folder to write; no such path yet, or an empty folder.
        uniform_rank: see `export_peft`.
        texts: what to compare on; None takes random token ids.

    Returns:
        What was written, by task, and the largest difference of its outputs (an expert: of its numbers, which must be
        equal to the bit) from the module's. The files stay, however large it is (see `unfaithful`).

    Raises:
        ValueError: an argument that does not fit, before anything is written.
    """
    if uniform_rank and to != "peft":
        raise ValueError(f"uniform_rank: {to} has no such form; use it with peft")
    if texts and to == "expert":
        raise ValueError("text: an expert's numbers are compared, not its outputs; leave it out")
    names = [spec.name for spec in module.specs]
    rows = text_rows(module, texts) if texts else random_rows(module)
    folders = {task: out}
    if task == ALL and task not in names:
        folders = {name: out / re.sub(r"[^\w.-]", "_", name) for name in names}
    with new_folder(out) as new:
        for name, folder in folders.items():
            target = new / folder.relative_to(out)
            if to == "peft":
                export_peft(module, target, name, uniform_rank)
            elif to == "expert":
                export_expert(module, target, name)
            else:
                export_merged(module, target, name)
    if to == "expert":
        compared = [(folder, name, expert_parity(module, folder, name)) for name, folder in folders.items()]
        return [Exported(*each, "float32, bit for bit", "numbers") for each in compared]
    dtype = str(module.backbone.dtype).removeprefix("torch.")
    how = f"{dtype}, {len(rows)} rows of {'text' if texts else 'random token ids'}"
    return [Exported(folder, name, parity(module, folder, name, rows), how) for name, folder in folders.items()]


def unfaithful(exports: list[Exported]) -> str | None:
    """Names the exports that do not compute what the module does, in one line; None where all do."""
    wrong = [each for each in exports if not each.parity.faithful]
    if not wrong:
        return None
    return (
        f"{', '.join(str(each.folder) for each in wrong)}: the {wrong[0].what} differ from the trained module's by "
        f"more than {wrong[0].parity.tolerance:g} of the largest; the files stay, but do not use them"
    )
