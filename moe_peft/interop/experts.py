"""One trained tensor-train expert as a folder that says what it is: `expert.safetensors` and `expert.json`.

The tensors are fp32: `<slot>.cores.<k>` [r_k, s_k, r_k+1] for every adapted linear (slot), and for a classifier
`head.weight` [C, D] and `head.bias` [C]. The description has the task, the backbone with its fingerprint, alpha (the
update is alpha ΔW), the rank, and the input and output modes of every linear, from which the index map of the matrix
follows (see `layers.tensor_train`). Nothing is pickled.
"""

import math
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from moe_peft.checkpoint import describe
from moe_peft.data.tasks import TaskSpec
from moe_peft.interop.files import read_about, read_tensors, write_json
from moe_peft.interop.folder import new_folder
from moe_peft.interop.heads import Head, own_head
from moe_peft.interop.parity import Parity
from moe_peft.layers.factors import TensorTrainFactors
from moe_peft.layers.tensor_train import Layout
from moe_peft.methods.base import MultitaskModule
from moe_peft.methods.heads import outputs_of
from moe_peft.methods.merging import task_number
from moe_peft.methods.tt_lora import TTLoRA
from moe_peft.methods.tt_lora_moe import TTLoRAMoE

FORMAT = 1
TENSORS, ABOUT = "expert.safetensors", "expert.json"


class Expert(NamedTuple):
    """One tensor-train expert, and where it fits but for the encoding: give a mixture the same data settings."""

    folder: Path
    """Where it lies."""
    method: str
    backbone: str
    """As `Backbone.describe` gives it."""
    fingerprint: str
    """Of the frozen backbone."""
    spec: TaskSpec
    alpha: float
    rank: int
    layouts: dict[str, Layout]
    """By linear."""
    cores: dict[str, list[Tensor]]
    """By linear, [r_{k-1}, s_k, r_k] each."""
    head: Head | None

    @property
    def task(self) -> str:
        """The name of the task that it was trained on."""
        return self.spec.name

    def tensors(self) -> dict[str, Tensor]:
        """Returns all numbers, by their names in the file."""
        named = {f"{slot}.cores.{at}": core for slot, cores in self.cores.items() for at, core in enumerate(cores)}
        return named | ({} if self.head is None else {"head.weight": self.head.weight, "head.bias": self.head.bias})


def expert_of(module: MultitaskModule, folder: str | Path, task: str | int) -> Expert:
    """Returns a copy of a task's expert.

    Args:
        module: a `TTLoRAMoE`, or a `TTLoRA`, whose one adapter is the expert of each of its tasks.
        folder: where it will lie.
        task: by name or id.

    Raises:
        ValueError: another method, no such task, or a value that is not finite.
    """
    if not isinstance(module, TTLoRA | TTLoRAMoE):
        raise ValueError(f"to: {type(module).__name__} has no tensor-train experts; use peft or merged")
    module.configure_model()
    number, about = task_number(module, task), describe(module)
    layouts, cores = {}, {}
    for slot, layer in module.adapted.items():
        factors = layer.factors
        assert isinstance(factors, TensorTrainFactors)
        own = [core.detach() if factors.experts is None else core.detach()[number] for core in factors.cores]
        layouts[slot], cores[slot] = factors.layout, [core.float().cpu().clone() for core in own]
    of_base = about["method"], about["backbone"], about["fingerprint"]
    spec, head = module.specs[number], own_head(module, number)
    expert = Expert(Path(folder), *of_base, spec, module.alpha, module.rank, layouts, cores, head)
    for name, tensor in expert.tensors().items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"the expert of task {spec.name!r} has values that are not finite in {name}; train anew")
    return expert


def export_expert(module: MultitaskModule, folder: str | Path, task: str | int) -> None:
    """Writes the folder of a task's expert, whole or not at all.

    Args:
        module: see `expert_of`.
        folder: where to; no such path yet, or an empty folder.
        task: by name or id.

    Raises:
        ValueError: see `expert_of`; or a folder that holds something.
    """
    expert = expert_of(module, folder, task)
    about = {
        "format": FORMAT,
        "method": expert.method,
        "backbone": expert.backbone,
        "fingerprint": expert.fingerprint,
        "task": asdict(expert.spec),
        "alpha": expert.alpha,
        "rank": expert.rank,
        "linears": {slot: layout._asdict() for slot, layout in expert.layouts.items()},
        "pooling": None if expert.head is None else expert.head.pooling,
    }
    with new_folder(folder) as new:
        save_file(expert.tensors(), new / TENSORS)
        write_json(new / ABOUT, about)


def read_expert(folder: str | Path) -> Expert:
    """Reads what `export_expert` wrote.

    Raises:
        ValueError: no such folder, files that are truncated, do not belong together or were written by something
            else, another format, or a value that is not finite.
    """
    folder = Path(folder)
    about = read_about(folder / ABOUT, FORMAT)
    tensors = read_tensors(folder / TENSORS)
    try:
        spec, alpha, rank, pooling = TaskSpec.from_saved(about["task"]), about["alpha"], about["rank"], about["pooling"]
        layouts = {slot: Layout(tuple(own["inputs"]), tuple(own["outputs"])) for slot, own in about["linears"].items()}
        cores = {slot: [f"{slot}.cores.{at}" for at in range(len(own.modes))] for slot, own in layouts.items()}
        shapes = {slot: layout.shapes(rank) for slot, layout in layouts.items()}
        origin = about["method"], about["backbone"], about["fingerprint"]
        if not math.isfinite(alpha):
            raise ValueError(f"alpha {alpha}")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"'{folder / ABOUT}' describes no expert ({error}); export it again") from None
    wanted = {name: shape for slot, names in cores.items() for name, shape in zip(names, shapes[slot], strict=True)}
    if pooling is not None:
        width = tensors["head.weight"].shape[-1] if "head.weight" in tensors else 0
        wanted |= {"head.weight": (outputs_of(spec), width), "head.bias": (outputs_of(spec),)}
    there = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if there != wanted:
        name = min(name for name in there.keys() | wanted if there.get(name) != wanted.get(name))
        raise ValueError(
            f"'{folder / TENSORS}': {name} has shape {there.get(name)}, but {wanted.get(name)} by {ABOUT}; export again"
        )
    head = Head(tensors["head.weight"], tensors["head.bias"], spec.kind, spec.choices, pooling) if pooling else None
    trained = {slot: [tensors[name] for name in names] for slot, names in cores.items()}
    return Expert(folder, *origin, spec, alpha, rank, layouts, trained, head)


def expert_parity(module: MultitaskModule, folder: str | Path, task: str | int) -> Parity:
    """Reads an exported expert back and compares every number with the module's: faithful is equal to the bit."""
    own, written = expert_of(module, folder, task).tensors(), read_expert(folder).tensors()
    difference = max((written[name] - tensor).abs().max().item() for name, tensor in own.items())
    return Parity(difference, max(tensor.abs().max().item() for tensor in own.values()), 0.0, "moe_peft")
