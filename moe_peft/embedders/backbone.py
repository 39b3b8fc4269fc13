"""Embedders that read the frozen backbone: its input embeddings (default) or the states of one of its layers.

Both see the prompt's tokens only, moved together to the left, so that neither padding nor the answer can show.
"""

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any, Literal

import numpy
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.rnn import pad_sequence

from moe_peft.backbones import Backbone, Classifier
from moe_peft.batch import Batch
from moe_peft.context import RoutingContext
from moe_peft.embedders.base import Embedder, input_embeddings, mean_by_row, prompt_tokens
from moe_peft.embedders.cache import EmbeddingCache


class InputEmbeddings(Embedder):
    """Mean of the frozen input embeddings over the prompt's tokens: no second pass, known before the first layer."""

    def _width(self) -> int:
        return input_embeddings(self.bound.model).weight.shape[1]

    def raw(self, batch: Batch) -> Tensor:
        """Returns [B, d] fp32."""
        tokens, lengths = prompt_tokens(batch)
        return mean_by_row(_look_up(input_embeddings(self.bound.model), tokens), lengths)

    def fingerprint(self) -> str:
        """Class and backbone weights."""
        return f"InputEmbeddings() of {self.bound.backbone.fingerprint(self.bound.model)}"


class HiddenStates(Embedder):
    """One layer's output, pooled over the prompt's tokens, from one more pass with the adapters off.

    Args:
        layer: 0 is the embedding output, n the output of the n-th layer (in a T5, of its encoder), null the last one.
        pooling: "mean" over the prompt's tokens, its "last" token, or "auto": last for a decoder, mean otherwise.
        keep: keep the vectors of texts seen before in memory, by their tokens: the frozen base gives them again. They
            are those of the first batch that held the text, so they depend on its other rows as far as rounding does.
    """

    def __init__(
        self, layer: int | None, pooling: Literal["mean", "last", "auto"] = "mean", keep: bool = False
    ) -> None:
        super().__init__()
        if pooling not in ("mean", "last", "auto"):
            raise ValueError(f"HiddenStates: pooling {pooling!r} is unknown; use mean, last or auto")
        self.layer, self.pooling, self.keep = layer, pooling, keep
        self._kept = EmbeddingCache(None)

    def bind(self, backbone: Backbone, model: nn.Module, context: RoutingContext) -> None:
        """Binds as every embedder, and forgets the vectors of another model."""
        super().bind(backbone, model, context)
        self._kept = EmbeddingCache(None)

    def _width(self) -> int:
        backbone = self.bound.backbone
        layers = backbone.config().num_hidden_layers
        if self.layer is not None and not 0 <= self.layer <= layers:
            raise ValueError(f"HiddenStates: layer {self.layer} does not exist, this backbone has 0 to {layers}")
        return backbone.hidden_size

    def raw(self, batch: Batch) -> Tensor:
        """Returns [B, d] fp32."""
        tokens, lengths = prompt_tokens(batch)
        if not self.keep:
            return self._states(tokens, lengths)
        texts = tokens.split(lengths.tolist())
        keys = [EmbeddingCache.key(str(text.tolist())) for text in texts]
        vectors: dict[str, Any] = {key: self._kept.get(key) for key in keys}
        missing = {key: text for key, text in zip(keys, texts, strict=True) if vectors[key] is None}
        if missing:
            new = list(missing.values())
            states = self._states(torch.cat(new), torch.tensor([len(text) for text in new], device=tokens.device))
            for key, state in zip(missing, states.cpu().numpy(), strict=True):
                self._kept.put(key, state)
                vectors[key] = state
        return torch.from_numpy(numpy.stack([vectors[key] for key in keys])).to(tokens.device)

    def _states(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Returns the pooled states [B, d] of prompts whose tokens [n] lie one after another."""
        backbone, model, context = self.bound
        # Right padding after the prompt alone: positions count from 0 and an answer is not there to be seen.
        input_ids = pad_sequence(list(tokens.split(lengths.tolist())), batch_first=True)
        mask = torch.arange(input_ids.shape[1], device=lengths.device) < lengths[:, None]
        trunk = model.get_encoder() if backbone.kind == "seq2seq" else model  # pyright: ignore[reportCallIssue]
        with context.disabled(), _evaluating(trunk):
            output = trunk(
                input_ids=input_ids, attention_mask=mask.long(), output_hidden_states=True, **_savings(trunk)
            )
        states = output.hidden_states[-1 if self.layer is None else self.layer]
        decoder = backbone.kind == "causal" or (isinstance(backbone, Classifier) and backbone.pooled_by == "last")
        if self.pooling == "last" or (self.pooling == "auto" and decoder):
            return states[torch.arange(len(lengths), device=lengths.device), lengths - 1].float()
        return mean_by_row(states[mask], lengths)

    def fingerprint(self) -> str:
        """Class, arguments and backbone weights."""
        how = "" if self.pooling == "mean" else f", pooling={self.pooling}"
        return f"HiddenStates(layer={self.layer}{how}) of {self.bound.backbone.fingerprint(self.bound.model)}"


def _look_up(embedding: nn.Embedding, tokens: Tensor) -> Tensor:
    """Returns the tokens' vectors [n, d], also where FSDP2 keeps the table sharded outside the model's own forward."""
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    weight = embedding.weight
    # A layer that was wrapped by itself gathers its table when it is entered; one in the root's group does not.
    if isinstance(weight, DTensor) and not isinstance(embedding, FSDPModule):
        return functional_call(embedding, {"weight": weight.full_tensor()}, (tokens,))
    return embedding(tokens)


def _savings(model: nn.Module) -> dict[str, int | bool]:
    """Returns the arguments, of those this model's forward knows, that leave out the cache and the output head."""
    known = inspect.signature(model.forward).parameters
    return {name: value for name, value in (("use_cache", False), ("logits_to_keep", 1)) if name in known}


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Within: the backbone's own dropout and gradient checkpointing are off."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
