"""Mixtures in fp64 on tiny backbones, and their formula as a loop over tokens and experts."""

from typing import Any

import torch
from torch import Tensor

from tests.tiny import build, randomise, tiny_backbone

KINDS = ["causal", "seq2seq", "classifier"]
SLOT = {
    "causal": "model.layers.0.mlp.up_proj",
    "seq2seq": "encoder.block.0.layer.1.DenseReluDense.wi",
    "classifier": "encoder.layer.0.intermediate.dense",
}
DEPTH = {"causal": "num_hidden_layers", "seq2seq": "num_layers", "classifier": "num_hidden_layers"}


def mixture(own: type, kind: str = "causal", layers: int = 2, **arguments: Any) -> Any:
    """A mixture in fp64 with random factors and routers, in eval mode."""
    backbone = tiny_backbone(kind)
    backbone.shape = backbone.shape | {DEPTH[kind]: layers}
    module = build(own, kind, backbone=backbone, **arguments)
    randomise(module)
    return module.double().eval()


def tokens(module: Any, slot: str, seed: int = 5) -> Tensor:
    """Random inputs of a linear [2, 3, D]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 3, module.adapted[slot].in_features, generator=generator, dtype=torch.float64)


def update_of(layer: Any, x: Tensor) -> Tensor:
    """What the adapter adds to the base's output."""
    return layer(x) - layer.base(x)


def looped(x: Tensor, update: Any) -> Tensor:
    """Applies a function of one token [D] -> [O] to every one."""
    return torch.stack([torch.stack([update(token) for token in row]) for row in x])
