"""How far an export's outputs lie from the module's own: what was written is read back and asked the same rows."""

import importlib.util
import math
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from moe_peft.batch import Batch
from moe_peft.interop.adapter_folder import read_adapter
from moe_peft.interop.lora_import import read_lora
from moe_peft.methods.base import MultitaskModule
from moe_peft.methods.merging import task_number

TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.2}
"""How far a faithful export's outputs may differ, relative to the largest output, by the backbone's dtype.

Rounding alone makes up to 6e-6, 0.015 and 0.07 (LoRA and MoRE of rank 8 on All-MiniLM-L6-v2 and SmolLM2-135M, random
token ids). A small adapter may move the outputs by no more: in half precision only gross faults show.
"""


class Parity(NamedTuple):
    """What a comparison found."""

    difference: float
    """Largest absolute difference of two outputs (logits; hidden states where the model is bare)."""
    largest: float
    """Largest absolute output, for scale."""
    tolerance: float
    """Largest difference that a faithful export may have, relative to the largest output."""
    reader: str
    """What read the export back."""

    @property
    def faithful(self) -> bool:
        """Whether the export computes what the module does; outputs that are no numbers never agree."""
        return self.difference <= self.tolerance * self.largest


def random_rows(module: MultitaskModule, rows: int = 4, length: int = 16) -> list[Tensor]:
    """Returns rows of random token ids [1, length], always the same."""
    generator = torch.Generator().manual_seed(0)
    size = module.built().get_input_embeddings().num_embeddings  # type: ignore[operator]
    return list(torch.randint(size, (rows, 1, length), generator=generator))


def text_rows(module: MultitaskModule, texts: list[str]) -> list[Tensor]:
    """Returns each text's token ids [1, S].

    Raises:
        ValueError: a text without any token.
    """
    rows = [module.backbone.tokenizer()(text)["input_ids"] for text in texts]
    if not all(rows):
        raise ValueError("text: an empty text has nothing to compare; give some words")
    return [torch.tensor([row]) for row in rows]


@torch.no_grad()
def parity(module: MultitaskModule, folder: str | Path, task: str | int, rows: list[Tensor]) -> Parity:
    """Compares an exported folder with the module that it came from.

    Args:
        module: the module, not merged.
        folder: what `export_peft` or `export_merged` wrote.
        task: the exported task.
        rows: token ids [1, S], a row each, so that no padding enters.
    """
    model, reader = read_back(module, Path(folder))
    number = task_number(module, task)
    device = next(module.built().parameters()).device
    differences, sizes = [], []
    module.route_by_task = True
    try:
        for row in rows:
            ids = row.to(device)
            mask, task_id = torch.ones_like(ids), torch.tensor([number], device=device)
            module.begin(Batch(input_ids=ids, attention_mask=mask, task_id=task_id))  # type: ignore[typeddict-item]
            own = _output(module, module.built(), ids, mask)
            differences.append((_output(module, model, row, mask.to(row.device)) - own).abs().max())
            sizes.append(own.abs().max())
    finally:
        module.route_by_task = False
    # Tensors' maxima, which keep a NaN.
    difference, largest = torch.stack(differences).max().item(), torch.stack(sizes).max().item()
    return Parity(difference, largest, TOLERANCE[module.backbone.dtype], reader)


def _output(module: MultitaskModule, model: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    inputs = {"decoder_input_ids": ids} if module.backbone.kind == "seq2seq" else {}
    found = model(input_ids=ids, attention_mask=mask, **inputs)
    return (found.logits if hasattr(found, "logits") else found.last_hidden_state).float().cpu()


def adapter_parity(module: MultitaskModule, folder: Path) -> Parity:
    """Reads an adapter's folder back and compares every number with the module's: faithful is equal to the bit."""
    own, written = module.adapter_state(), read_adapter(folder)["state_dict"]
    difference = largest = 0.0
    for name in own.keys() | written:
        one, other = own[name].cpu(), written[name]
        if (one.dtype, one.shape) != (other.dtype, other.shape):
            difference = math.inf
        elif one.numel():
            difference = max(difference, (one.double() - other.double()).abs().max().item())
            largest = max(largest, one.double().abs().max().item())
    return Parity(difference, largest, 0.0, "moe_peft")


def read_back(module: MultitaskModule, folder: Path) -> tuple[nn.Module, str]:
    """Loads an exported folder anew and says with what: transformers, peft where it is installed, or `apply_lora`."""
    backbone = module.backbone
    if not (folder / "adapter_config.json").is_file():
        import transformers

        auto = getattr(transformers, backbone.auto_class)
        model = auto.from_pretrained(folder, dtype=backbone.dtype, attn_implementation=backbone.attention)
        return model.eval(), "transformers"
    if importlib.util.find_spec("peft") is not None:
        from peft import PeftModel

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft and transformers warn of each other's deprecated names
            return PeftModel.from_pretrained(backbone.load(), str(folder)).eval(), "peft"  # type: ignore[arg-type]
    return apply_lora(backbone.load(), folder), "moe_peft (peft is not installed)"


@torch.no_grad()
def apply_lora(model: nn.Module, folder: Path) -> nn.Module:
    """Adds an exported LoRA to a plain model's weights, in place."""
    for slot, update in read_lora(folder).updates.items():
        weight = model.get_submodule(slot).weight
        assert isinstance(weight, Tensor)
        weight.copy_(weight.float() + (update.scale * update.b @ update.a).to(weight.device))
    return model
