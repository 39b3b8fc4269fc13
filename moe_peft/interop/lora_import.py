"""A LoRA in Hugging Face PEFT's files, read without importing PEFT.

Every linear's update is scale * B A; scale = alpha / r, or alpha / sqrt(r) for a rank-stabilised LoRA. Whatever is more
than that (other tensors, other rules of the forward, a base that was changed before training) is refused.
"""

import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe_peft.interop.files import read_json, read_tensors
from moe_peft.interop.heads import Head, read_head
from moe_peft.interop.hub import local_folder
from moe_peft.interop.peft import LowRank
from moe_peft.layers.peft_names import by_pattern, scale_of

CONFIG, TENSORS, RANKS = "adapter_config.json", "adapter_model.safetensors", "rank_table.json"
VARIANTS = (
    *("use_dora", "use_qalora", "use_bdlora", "alora_invocation_tokens", "arrow_config", "kasa_config"),
    *("monteclora_config", "modules_to_save", "layer_replication", "trainable_token_indices", "target_parameters"),
)
"""Settings that make an adapter something else than scale * B A on linears."""
PLAIN_STARTS = (None, True, False, "gaussian", "orthogonal", "eva")
"""Ways to initialise a LoRA that leave the base's weights alone (PiSSA and others take their start out of them)."""


class Lora(NamedTuple):
    """A LoRA of one task."""

    folder: Path
    """Where it lies."""
    task: str
    """By the head or the rank table that our own exports have beside it, else the folder's name."""
    fingerprint: str | None
    """Of the frozen backbone, where the rank table of our own exports gives it."""
    updates: dict[str, LowRank]
    """By linear."""
    head: Head | None
    """Our own exports have one beside them, where the backbone is a classifier."""
    config: dict[str, Any]
    """The content of adapter_config.json."""
    dtype: torch.dtype
    """Of the tensors in the file; here they are fp32."""

    @property
    def base(self) -> str | None:
        """What the file calls its base model."""
        return self.config.get("base_model_name_or_path")


def read_lora(folder: str | Path) -> Lora:
    """Reads a folder that PEFT (`save_pretrained`) or `export_peft` wrote.

    Args:
        folder: where it lies, or its id on a hub.

    Raises:
        ValueError: no such folder, truncated files, a value that is not finite, or an adapter that is no plain LoRA.
    """
    folder = local_folder(folder)
    config = read_json(folder / CONFIG)
    _refuse_variants(folder / CONFIG, config)
    file = folder / TENSORS
    if not file.is_file() and (folder / "adapter_model.bin").is_file():
        raise ValueError(
            f"'{folder}' holds a pickled adapter_model.bin, which is never read; convert it to safetensors"
        )
    halves: dict[str, dict[str, Tensor]] = {}
    for name, tensor in read_tensors(file, as_stored=True).items():
        found = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", name)
        if found is None or tensor.dim() != 2:
            raise ValueError(
                f"'{file}': {name} {list(tensor.shape)} is no lora_A or lora_B of a linear; train those only"
            )
        halves.setdefault(found[1], {})[found[2]] = tensor
    if not halves:
        raise ValueError(f"'{file}' holds no tensors; export the folder again")
    updates = {slot: _update(folder / CONFIG, config, slot, own) for slot, own in halves.items()}
    table = read_json(folder / RANKS) if (folder / RANKS).is_file() else {}
    task, head = read_head(folder) or (table.get("task", folder.absolute().name), None)
    dtype = next(iter(next(iter(halves.values())).values())).dtype
    return Lora(folder, task, table.get("fingerprint"), updates, head, config, dtype)


def _refuse_variants(file: Path, config: dict[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise ValueError(f"'{file}': peft_type is {config.get('peft_type')!r}; only LORA has an update of low rank")
    for name in VARIANTS:
        if config.get(name):
            raise ValueError(f"'{file}': {name} is {config[name]!r}, which is no plain LoRA; train one without it")
    if config.get("init_lora_weights") not in PLAIN_STARTS:
        raise ValueError(
            f"'{file}': init_lora_weights {config['init_lora_weights']!r} changed the base itself; convert it to "
            "a plain LoRA (PEFT: save_pretrained with path_initial_model_for_weight_conversion)"
        )


def _update(file: Path, config: dict[str, Any], slot: str, halves: dict[str, Tensor]) -> LowRank:
    if len(halves) < 2:
        raise ValueError(
            f"'{file.parent / TENSORS}': {slot} has only lora_{next(iter(halves))}; export the folder again"
        )
    try:
        rank = by_pattern(config.get("rank_pattern"), config["r"], slot)
        alpha = by_pattern(config.get("alpha_pattern"), config["lora_alpha"], slot)
        scale = float(scale_of(alpha, rank, bool(config.get("use_rslora"))))
    except (KeyError, TypeError, AttributeError, ZeroDivisionError, ValueError, re.error) as error:
        raise ValueError(f"'{file}' gives no rank and alpha for {slot} ({error!r}); export the folder again") from None
    a, b = halves["A"].float(), halves["B"].float()
    if not len(a) == b.shape[1] == rank:
        shapes = f"{list(a.shape)} and {list(b.shape)}"
        raise ValueError(f"'{file}': {slot} has rank {rank}, but its A and B are {shapes}; export the folder again")
    return LowRank(a, b, scale)
