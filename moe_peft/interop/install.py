"""Bringing trained experts into a mixture: our own exports bit for bit, LoRAs by TT-SVD at the mixture's rank.

Reading (`read_any`, `collect`) knows no module, `check` changes none, `install` checks and then copies one expert.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from moe_peft.interop.experts import ABOUT, Expert, read_expert
from moe_peft.interop.fit import refuse_other_base, refuse_other_linears, refuse_unfit
from moe_peft.interop.heads import check_head, install_head
from moe_peft.interop.hub import local_folder
from moe_peft.interop.lora_import import CONFIG, Lora, read_lora
from moe_peft.layers.factors import TensorTrainFactors
from moe_peft.methods.base import MultitaskModule
from moe_peft.methods.merging import merged_layers
from moe_peft.methods.tt_lora import TTLoRA
from moe_peft.methods.tt_lora_moe import TTLoRAMoE
from moe_peft.sharding import edited


class Installed(NamedTuple):
    """What became of an expert."""

    folder: Path
    task: str
    errors: dict[str, float]
    """Relative error of the compressed update by linear; none where the cores were taken as they are."""
    error: float
    """That of all linears together (Frobenius)."""
    notes: list[str]
    """What a user should know."""

    def __str__(self) -> str:
        """Returns one line."""
        line = f"expert of {self.task}: from '{self.folder}'"
        if self.errors:
            worst = max(self.errors, key=self.errors.__getitem__)
            line += f", compressed with relative error {self.error:.2g} (at most {self.errors[worst]:.2g}, {worst})"
        return "; ".join([line, *self.notes])


def read_any(folder: str | Path) -> Expert | Lora:
    """Reads an expert of our own or a LoRA in PEFT's files.

    Args:
        folder: where it lies, or its id on a hub.

    Raises:
        ValueError: no such folder, neither of the two, or see `read_expert` and `read_lora`.
    """
    folder = local_folder(folder)
    for file, reader in ((ABOUT, read_expert), (CONFIG, read_lora)):
        if (folder / file).is_file():
            return reader(folder)
    raise ValueError(
        f"'{folder}' holds neither {ABOUT} nor {CONFIG}; name one that tools/export.py --to expert or PEFT wrote"
    )


def collect(folders: Sequence[str | Path], tasks: Sequence[str]) -> list[Expert | Lora]:
    """Reads experts, in any order, and returns them in the order of the tasks.

    Raises:
        ValueError: two experts of one task, one of no task, or a task without any; or see `read_any`.
    """
    found: dict[str, Expert | Lora] = {}
    for folder in folders:
        expert = read_any(folder)
        if expert.task in found:
            raise ValueError(f"'{found[expert.task].folder}' and '{folder}' are both of {expert.task!r}; drop one")
        if expert.task not in tasks:
            raise ValueError(
                f"'{folder}' is of task {expert.task!r}, which the run lacks ({', '.join(tasks)}); drop it"
            )
        found[expert.task] = expert
    missing = [task for task in tasks if task not in found]
    if missing:
        raise ValueError(f"no trained expert of {', '.join(missing)}; name its export too, or leave the task out")
    return [found[task] for task in tasks]


def check(module: TTLoRAMoE, expert: Expert | Lora, task_id: int) -> None:
    """Refuses an expert that does not fit a mixture; changes nothing.

    Args:
        module: built.
        expert: what was read.
        task_id: whose expert it shall be, whatever it was called before.

    Raises:
        ValueError: a mixture that is merged or of alpha 0, another backbone, other linears, modes or sizes, a rank that
            is above the mixture's, other classes or pooling, or a head that is there on one side only.
    """
    where = f"expert '{expert.folder}'"
    of = expert.backbone if isinstance(expert, Expert) else expert.base
    refuse_other_base(module, expert.fingerprint, of, where)
    if merged_layers(module):
        raise ValueError(f"{where} cannot be taken into a merged model; call unmerge() first")
    if module.alpha == 0:
        raise ValueError(f"{where} cannot be taken in where alpha is 0; give the mixture another alpha")
    if isinstance(expert, Lora):
        refuse_unfit(module, expert, where)
    else:
        _check_cores(module, expert, where)
    _check_task(module, expert, task_id, where)


def _check_cores(module: TTLoRAMoE, expert: Expert, where: str) -> None:
    refuse_other_linears(module, expert.layouts, where)
    missing = [slot for slot in module.adapted if slot not in expert.layouts]
    if missing:
        raise ValueError(f"{where} does not adapt {missing[0]}, which the mixture does; set targets as it had them")
    for slot, layout in expert.layouts.items():
        here = _factors(module, slot).layout
        if layout != here:
            raise ValueError(
                f"{where}: {slot} has modes {[*layout.inputs]} and {[*layout.outputs]}, the mixture {[*here.inputs]} "
                f"and {[*here.outputs]}; give the mixture its shapes"
            )
        if any(there > own for there, own in zip(layout.ranks(expert.rank), layout.ranks(module.rank), strict=True)):
            raise ValueError(
                f"{where} has rank {expert.rank}, the mixture {module.rank}; build it with rank {expert.rank}"
            )


def _check_task(module: TTLoRAMoE, expert: Expert | Lora, task_id: int, where: str) -> None:
    spec, head = module.specs[task_id], expert.head
    if (head is None) != (module.heads is None):
        fix = "export it with its head" if head is None else "configure the Classifier backbone that it was trained on"
        raise ValueError(f"{where} has {'no' if head is None else 'a'} head for the classes of {spec.name!r}; {fix}")
    of = expert.spec if isinstance(expert, Expert) else head
    if of is not None and (of.kind, of.choices) != (spec.kind, spec.choices):
        raise ValueError(
            f"{where} is of {of.kind} with classes {[*of.choices]}, task {spec.name!r} of {spec.kind} with "
            f"{[*spec.choices]}; give the same classes"
        )
    if head is not None:
        check_head(module, head, task_id, where)


@torch.no_grad()
def install(module: TTLoRAMoE, expert: Expert | Lora, task_id: int) -> Installed:
    """Copies an expert, with its head, into the stacked experts of a mixture; the other experts stay as they are.

    An expert of our own is copied bit for bit; where alpha differs, its last core takes up the quotient, and where the
    mixture's rank is higher, zeros fill the bonds. A LoRA is compressed; linears that it lacks get no update.

    Args:
        module: built.
        expert: what was read.
        task_id: whose expert it becomes.

    Raises:
        ValueError: see `check`; nothing is changed then.
    """
    check(module, expert, task_id)
    if isinstance(expert, Lora):
        done = _install_lora(module, expert, task_id)
    else:
        done = _install_cores(module, expert, task_id)
    if expert.head is not None:
        install_head(module, expert.head, task_id)
    return done


def _install_cores(module: TTLoRAMoE, expert: Expert, task_id: int) -> Installed:
    for slot, cores in expert.cores.items():
        last = cores[-1] if expert.alpha == module.alpha else cores[-1] * (expert.alpha / module.alpha)
        _factors(module, slot).set_cores([*cores[:-1], last], task_id)
    here, notes = module.specs[task_id].template, []
    if expert.spec.template != here:
        notes.append(f"it was trained on prompts {expert.spec.template!r}, here they are {here!r}")
    return Installed(expert.folder, module.specs[task_id].name, {}, 0.0, notes)


def _install_lora(module: TTLoRAMoE, lora: Lora, task_id: int) -> Installed:
    errors = compress_into(module, lora, task_id)
    return Installed(lora.folder, module.specs[task_id].name, errors, whole_error(lora, errors), notes_on(module, lora))


def compress_into(module: TTLoRAMoE | TTLoRA, lora: Lora, expert: int | None = None) -> dict[str, float]:
    """Makes tensor trains what TT-SVD leaves of a LoRA that fits; linears that it lacks get no update.

    Args:
        module: built.
        lora: what was read.
        expert: whose trains, where there are several.

    Returns:
        The relative error by linear.
    """
    errors = {}
    for slot, (a, b, scale) in lora.updates.items():
        errors[slot] = _factors(module, slot).set_update(a, b * (scale / module.alpha), expert)
    for slot in [slot for slot in module.adapted if slot not in lora.updates]:
        with edited(_factors(module, slot).cores[-1]) as value:
            (value if expert is None else value[expert]).zero_()
    return errors


def notes_on(module: MultitaskModule, lora: Lora) -> list[str]:
    """Returns what a user should know of a LoRA that was taken in."""
    lacking, notes = [slot for slot in module.adapted if slot not in lora.updates], []
    if lacking:
        notes.append(f"{len(lacking)} linears that it lacks get no update, first {lacking[0]}")
    if lora.base and lora.base != module.backbone.name:
        notes.append(f"it calls its base {lora.base!r}, the backbone here is {module.backbone.name!r}")
    return notes


def whole_error(lora: Lora, errors: dict[str, float]) -> float:
    """Returns the relative error of all linears together (Frobenius) from those of each."""
    squares = {slot: scale**2 * _square(a, b) for slot, (a, b, scale) in lora.updates.items()}
    total = sum(squares.values())
    return math.sqrt(sum(errors[slot] ** 2 * own for slot, own in squares.items()) / total) if total else 0.0


def _square(a: Tensor, b: Tensor) -> float:
    """Returns the squared Frobenius norm of B A, without making it."""
    a, b = a.double(), b.double()
    return ((b.mT @ b) * (a @ a.mT)).sum().item()


def _factors(module: MultitaskModule, slot: str) -> TensorTrainFactors:
    factors = module.adapted[slot].factors
    assert isinstance(factors, TensorTrainFactors)
    return factors
