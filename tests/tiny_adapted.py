"""Plain Hugging Face models with exported adapters of every method on them, and prompts to give them."""

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

import moe_peft
from moe_peft.interop.adapter_folder import ABOUT, TENSORS, write_adapter
from moe_peft.layers.adapted import AdaptedLinear
from tests.tiny_checkpoints import TASKS, trained

METHODS = {
    "LoRA": ("LoRA", {"rank": 4}),
    "TRex": ("TRex", {"r1": 2, "r2": 3}),
    "MoR1E": ("TRex", {"r1": 4, "r2": 4, "mode": "rank1"}),
    "MoRE": ("MoRE", {"rank": 5}),
    "TTLoRA": ("TTLoRA", {"rank": 2}),
    "TTLoRAMoE": ("TTLoRAMoE", {"rank": 2}),
}
AUTO = {"causal": "AutoModelForCausalLM", "seq2seq": "AutoModelForSeq2SeqLM", "classifier": "AutoModel"}
TASK_IDS = [0, 2, 1, 1]
NAMES = [TASKS[task].name for task in TASK_IDS]
PROMPTS = [[5, 9, 33, 21, 60], [7, 8], [44, 45, 46], [90, 12, 13, 14, 15, 16, 17]]
GREEDY = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, "min_new_tokens": 6}


def base(backbones: dict[str, Path], kind: str = "causal") -> Any:
    """The plain model of a kind, as a user loads it."""
    return getattr(transformers, AUTO[kind]).from_pretrained(backbones[kind], dtype=torch.float32).eval()


def exported(backbones: dict[str, Path], folder: Path, name: str, kind: str = "causal") -> tuple[Any, Any]:
    """A trained module of a method, and the same as a folder on a plain model."""
    method, arguments = METHODS[name]
    module = trained(backbones[kind], method, kind, **arguments)
    write_adapter(module, folder)
    return module, moe_peft.load_adapter(base(backbones, kind), folder)


def padded(prompts: list[list[int]]) -> dict[str, Tensor]:
    """Prompts as a tokenizer pads them, on the left."""
    width = max(map(len, prompts))
    ids, mask = (torch.zeros(len(prompts), width, dtype=torch.int64) for _ in range(2))
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :], mask[row, width - len(prompt) :] = torch.tensor(prompt), 1
    return {"input_ids": ids, "attention_mask": mask}


def plain_linears(model: Any) -> bool:
    """Whether no linear of a model is adapted."""
    return not any(isinstance(layer, AdaptedLinear) for layer in model.modules())


def spoil(folder: Path, what: str) -> None:
    """Damages an adapter's folder."""
    tensors, about = load_file(folder / TENSORS), json.loads((folder / ABOUT).read_text())
    if what == "lacks":
        tensors.pop(next(name for name in tensors if "layers.1" in name))
    elif what == "shape":
        name = next(name for name in tensors if tensors[name].dim() == 2)
        tensors[name] = tensors[name][:1].clone()
    elif what == "fingerprint":
        about["fingerprint"] = "0" * 16
    elif what == "method":
        about["config"]["class_path"] = "NoSuchMethod"
    elif what == "format":
        about["format"] = 99
    save_file(tensors, folder / TENSORS)
    (folder / ABOUT).write_text(json.dumps(about) if what != "json" else "{")
