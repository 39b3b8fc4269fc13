"""A task's adapters as an ordinary LoRA in Hugging Face PEFT's files, without importing PEFT.

PEFT computes y = W0 x + (alpha / rank) B A x per linear. A fixed core C is folded into these four: the components it
keeps, its scalar into alpha, and what is no scalar into B (or A). Shapes: k components kept, D in, O out.
"""

import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from moe_peft.interop.files import write_json
from moe_peft.interop.folder import new_folder
from moe_peft.interop.heads import write_head
from moe_peft.layers.adapted import AdaptedLinear
from moe_peft.methods.base import MultitaskModule
from moe_peft.methods.lora import Imported, LoRA
from moe_peft.methods.merging import static_cores, task_number

TASK_TYPES = {"causal": "CAUSAL_LM", "seq2seq": "SEQ_2_SEQ_LM", "classifier": "FEATURE_EXTRACTION"}
"""PEFT's names for what a backbone is; a classifier's backbone is bare, its head lies beside it."""


class LowRank(NamedTuple):
    """One linear's update, scale * B A, without a core."""

    a: Tensor
    """[k, D]."""
    b: Tensor
    """[O, k]."""
    scale: float

    def padded(self, rank: int) -> "LowRank":
        """Returns the same update at another rank and scale 1: zero rows and columns added, the scale inside B."""
        more = rank - len(self.a)
        a = nn.functional.pad(self.a, (0, 0, 0, more))
        return LowRank(a, nn.functional.pad(self.scale * self.b, (0, more)), 1.0)


@torch.no_grad()
def low_rank(layer: AdaptedLinear, core: Tensor | None, task: int = 0) -> LowRank:
    """Folds a fixed core into an adapted linear's factors.

    Args:
        layer: the linear.
        core: None (identity), [R] (diagonal; components of weight zero are dropped) or [Q, R] (goes into A, or
            where Q is larger into B).
        task: whose factors, where tasks have their own.
    """
    a, b = layer.fixed_factors(task)
    if core is None:
        return LowRank(a, b, layer.scale)
    if core.dim() == 2:
        tall = len(core) > core.shape[1]
        return LowRank(a, b @ core, layer.scale) if tall else LowRank(core @ a, b, layer.scale)
    kept = core.nonzero().flatten()
    weights, a, b = core[kept], a[kept], b[:, kept]
    if (weights == weights[0]).all():
        return LowRank(a, b, layer.scale * weights[0].item())
    return LowRank(a, b * weights, layer.scale)


def export_peft(
    module: MultitaskModule, folder: str | Path, task: str | int, uniform_rank: bool = False, name: str | None = None
) -> None:
    """Writes a folder that `peft.PeftModel.from_pretrained` loads onto the plain backbone.

    `adapter_model.safetensors` and `adapter_config.json` as PEFT writes them, `rank_table.json` beside them, and for
    classifiers the task's head (`head.safetensors`, `head.json`).

    Args:
        module: a method whose cores do not depend on the input.
        folder: where to; no such path yet, or an empty folder.
        task: by name or id.
        uniform_rank: give every linear the largest rank, padded with zeros, and scale 1, for serving engines that
            ignore ranks and alphas per module.
        name: what the rank table calls what is served, where it is no task.

    Raises:
        ValueError: no such task, cores that depend on the input, or a folder that holds something.
    """
    cores, number = static_cores(module, task), task_number(module, task)
    updates = {slot: low_rank(layer, cores[slot], number) for slot, layer in module.adapted.items()}
    ranks = {slot: len(update.a) for slot, update in updates.items()}
    if uniform_rank:
        rank = max(layer.factors.rank_out for layer in module.adapted.values())
        updates = {slot: update.padded(rank) for slot, update in updates.items()}
    with new_folder(folder) as new:
        tensors = {}
        for slot, update in updates.items():
            tensors[f"base_model.model.{slot}.lora_A.weight"] = update.a
            tensors[f"base_model.model.{slot}.lora_B.weight"] = update.b
        given = None if uniform_rank or not isinstance(module, LoRA) else module.imported
        tensors = {key: _stored(tensor, given) for key, tensor in tensors.items()}
        save_file(tensors, new / "adapter_model.safetensors", metadata={"format": "pt"})
        write_json(new / "adapter_config.json", given.config if given else adapter_config(module, updates))
        write_json(new / "rank_table.json", _rank_table(module, name or module.specs[number].name, ranks))
        write_head(module, number, new)


def _stored(tensor: Tensor, given: Imported | None) -> Tensor:
    """Returns a tensor as it is saved: in the dtype in which it was read, where that still holds all of it."""
    tensor = tensor.detach().cpu().contiguous()
    narrow = tensor if given is None else tensor.to(given.dtype)
    return narrow if torch.equal(narrow.to(tensor.dtype), tensor) else tensor


def adapter_config(module: MultitaskModule, updates: dict[str, LowRank]) -> dict[str, Any]:
    """Returns PEFT's configuration: the largest rank with its alpha, and a pattern for every linear that differs.

    PEFT reads a pattern as a regular expression that the end of a name must match, from a dot on: a plain name would
    match longer names too, and its dots any character. Anchored and escaped it matches its own linear only, from PEFT
    0.15.0 on; earlier versions find no anchored pattern and refuse the tensors of other ranks. Without patterns (the
    uniform form, or equal ranks and scales) the files load from PEFT 0.9.0 on.
    """
    ranks = {slot: len(update.a) for slot, update in updates.items()}
    alphas = {slot: _plain(update.scale * ranks[slot]) for slot, update in updates.items()}
    first = max(ranks, key=lambda slot: ranks[slot])
    rank, alpha = ranks[first], alphas[first]
    return {
        "peft_type": "LORA",
        "task_type": TASK_TYPES[module.backbone.kind],
        "base_model_name_or_path": module.backbone.name,  # the model's own may be a private cache
        "revision": module.backbone.revision,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {f"^{re.escape(slot)}": own for slot, own in ranks.items() if own != rank},
        "alpha_pattern": {f"^{re.escape(slot)}": own for slot, own in alphas.items() if own != alpha},
        "target_modules": _targets(module),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "use_rslora": False,
        "use_dora": False,
    }


def _targets(module: MultitaskModule) -> list[str] | str:
    """Returns the linears' names, or one expression of them where a name in a list would also match a longer name."""
    slots = list(module.adapted)
    others = [name for name, _ in module.built().named_modules() if name not in module.adapted]
    if any(other.endswith(f".{slot}") for slot in slots for other in others):
        return "|".join(map(re.escape, slots))
    return slots


def _rank_table(module: MultitaskModule, name: str, ranks: dict[str, int]) -> dict[str, Any]:
    """Returns the exported ranks by linear, every task's where the method has a table of them, and whose base it is."""
    table: dict[str, Any] = {"task": name, "fingerprint": module.fingerprint, "ranks": ranks}
    find_all = getattr(module, "rank_table", None)
    if find_all is not None:
        table |= {"tasks": [spec.name for spec in module.specs], "table": find_all()}
    return table


def _plain(number: float) -> int | float:
    """Returns a whole number as an int, which is what PEFT declares an alpha to be."""
    return int(number) if number == int(number) else number
