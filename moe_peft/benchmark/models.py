"""Whole models: one training step, or one decoded token, of every method and of Hugging Face PEFT, on one backbone.

Every contestant has adapters in all linears, random and not zero, on the same frozen weights (shared, not copied).
Shapes: B rows, S tokens, T tasks (row b belongs to task b mod T).
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import ArgumentParser
from torch import Tensor, nn

from moe_peft.backbones import Backbone, CausalLM
from moe_peft.batch import IGNORE_INDEX, Batch
from moe_peft.data.tasks import TaskSpec
from moe_peft.layers.adapted import AdaptedLinear
from moe_peft.methods.base import MultitaskModule
from moe_peft.methods.lora import LoRA
from moe_peft.methods.more import MoRE
from moe_peft.methods.trex import TRex
from moe_peft.methods.tt_lora import TTLoRA
from moe_peft.methods.tt_lora_moe import TTLoRAMoE

SMALL = {
    "model_type": "llama",
    "vocab_size": 2048,
    "hidden_size": 512,
    "intermediate_size": 1376,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""13.7 million parameters; random, since nothing here depends on their values."""
SPECS = [TaskSpec(f"task{i}", "classification", "accuracy", "{text}", ("no", "yes")) for i in range(8)]
OWN = "LoRA r=8"
RANK = 8
NOISE = 0.05
"""What is added to every start value, times a normal number."""
METHODS: dict[str, tuple[Callable[..., MultitaskModule], dict[str, Any]]] = {
    OWN: (LoRA, {"rank": RANK, "alpha": 2.0 * RANK}),
    "T-REX 4x8": (TRex, {"r1": 4, "r2": 8}),
    "MoR1E E=8": (TRex, {"r1": 8, "r2": 8, "mode": "rank1"}),
    "MoRE r=8": (MoRE, {"rank": 8}),
    "TT-LoRA r=5": (TTLoRA, {"rank": 5}),
    f"TT-LoRA MoE, {len(SPECS)} experts": (TTLoRAMoE, {"rank": 5, "routing": "oracle"}),
}
PEFT, XLORA = "HF PEFT LoRA r=8", "HF PEFT X-LoRA, 4 experts"


def backbone_of(path: Path | None) -> Backbone:
    """Returns the backbone of a configuration file such as configs/bases/smollm2-135m.yaml; None is a small random one.

    Raises:
        ValueError: no such file, or no decoder in it.
    """
    if path is None:
        return CausalLM("small-llama", shape=SMALL, random_weights=True)
    if not path.is_file():
        raise ValueError(f"backbone: there is no file '{path}'; give one such as configs/bases/smollm2-135m.yaml")
    try:
        given = yaml.safe_load(path.read_text())["model"]["init_args"]["backbone"]
    except (KeyError, TypeError):
        raise ValueError(f"backbone: '{path}' has no model.init_args.backbone; give a file of configs/bases") from None
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Backbone, "backbone")
    found = parser.instantiate_classes(parser.parse_object({"backbone": given}))["backbone"]
    if found.kind != "causal":
        raise ValueError(f"backbone: '{path}' is a {found.kind} model; give a causal one, which also generates")
    return found


def random_batch(vocabulary: int, rows: int, tokens: int, device: str) -> Batch:
    """Returns rows of equal length without padding, the last quarter of each being the answer."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, vocabulary, (rows, tokens), generator=generator)
    answer = torch.arange(tokens) >= tokens - max(1, tokens // 4)
    tasks = torch.arange(rows) % len(SPECS)
    batch = Batch(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        prompt_mask=(~answer).expand(rows, -1).contiguous(),
        labels=ids.where(answer, IGNORE_INDEX),
        task_id=tasks,
        row_id=[f"row{row}" for row in range(rows)],
        text=[f"text {row}" for row in range(rows)],
        task_share=torch.bincount(tasks)[tasks].float(),
        rows_share=float(rows),
        tokens_share=float(rows * int(answer.sum())),
    )
    moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
    return moved  # type: ignore[return-value]


def sharing(backbone: Backbone, model: nn.Module) -> Backbone:
    """Returns a backbone whose every load is a new model on the weights of this one."""
    weights = {id(weight): weight for weight in model.parameters()}
    shared = copy.copy(backbone)
    shared.load = lambda: copy.deepcopy(model, dict(weights))  # type: ignore[method-assign]
    return shared


@torch.no_grad()
def randomise(module: nn.Module) -> None:
    """Adds small random numbers to everything that is trained, so that no adapter is zero."""
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator) * NOISE
            parameter.add_(noise.to(parameter.device))


def build(backbone: Backbone, name: str) -> MultitaskModule:
    """Returns one of our methods, alive: a prior has random clusters; a mixture of experts learns its experts."""
    method, arguments = METHODS[name]
    torch.manual_seed(0)
    module = method(backbone=backbone, tasks=SPECS, **arguments)
    module.configure_model()
    randomise(module)
    if module.prior is not None:
        module.prior.embedder.fitted.fill_(True)
        module.prior.set_centroids(torch.randn_like(module.prior.centroids))
    if isinstance(module, TTLoRAMoE):
        module.closed_groups = frozenset({"routers"})
    return module


def factors_of(module: MultitaskModule) -> dict[str, tuple[Tensor, Tensor]]:
    """Returns A and B of every adapted linear of a LoRA, by name."""
    layers: dict[str, AdaptedLinear] = module.adapted
    return {slot: layer.fixed_factors(0) for slot, layer in layers.items()}
