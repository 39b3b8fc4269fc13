"""Embedders that read the frozen backbone: its input embeddings (default) or the states of one of its layers.

Both see the prompt's tokens only, moved together to the left, so that neither padding nor the answer can show.
"""

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy
import torch
from torch import Tensor, nn

from moe_peft.backbones import Backbone, Classifier
from moe_peft.batch import Batch
from moe_peft.context import RoutingContext
from moe_peft.embedders.base import Embedder, input_embeddings, mean_by_row, prompt_tokens
from moe_peft.embedders.cache import EmbeddingCache
from moe_peft.embedders.early_exit import EarlyExit
from moe_peft.embedders.passes import Shape, padded, passes, shape_on
from moe_peft.sharding import enter, is_sharded


class InputEmbeddings(Embedder):
    """Mean of the frozen input embeddings over the prompt's tokens: no second pass, known before the first layer."""

    def _width(self) -> int:
        return input_embeddings(self.bound.model).weight.shape[1]

    def raw(self, batch: Batch) -> Tensor:
        """Returns [B, d] fp32."""
        tokens, lengths = prompt_tokens(batch)
        model = self.bound.model
        return mean_by_row(enter(model, input_embeddings(model), tokens), lengths)

    def fingerprint(self) -> str:
        """Class and backbone weights."""
        return f"InputEmbeddings() of {self.base_fingerprint()}"


class HiddenStates(Embedder):
    """One layer's output, pooled over the prompt's tokens, from one more pass with the adapters off.

    The layers after it do not run. A prompt's vector depends on its own tokens only, to the bit, so that a vector that
    was kept is the one that the frozen base would give again. Under FSDP2, where all ranks must run the base together,
    every batch makes one pass through all layers, and nothing is kept.

    Args:
        layer: 0 is the embedding output, n the output of the n-th layer (in a T5, of its encoder), null the last one.
        pooling: "mean" over the prompt's tokens, its "last" token, or "auto": last for a decoder, mean otherwise.
        keep: keep the vectors of prompts seen before, 512 MiB of them in memory.
        cache_dir: folder that keeps them for other runs too; "auto" is `embeddings` in the project's cache, null is
            memory only.
    """

    def __init__(
        self,
        layer: int | None,
        pooling: Literal["mean", "last", "auto"] = "mean",
        keep: bool = True,
        cache_dir: str | None = None,
    ) -> None:
        super().__init__()
        if pooling not in ("mean", "last", "auto"):
            raise ValueError(f"HiddenStates: pooling {pooling!r} is unknown; use mean, last or auto")
        if cache_dir is not None and not keep:
            raise ValueError(
                f"HiddenStates: cache_dir {cache_dir!r} keeps vectors, but keep is false; drop one of them"
            )
        self.layer, self.keep, self.cache_dir = layer, keep, cache_dir
        self.pooling: Literal["mean", "last", "auto"] = pooling

    def bind(self, backbone: Backbone, model: nn.Module, context: RoutingContext) -> None:
        """Binds as every embedder, and forgets the vectors of another model."""
        super().bind(backbone, model, context)
        self._exit, self._kept, self._base = EarlyExit(self.layer), EmbeddingCache.at(self.cache_dir), ""

    def _width(self) -> int:
        backbone = self.bound.backbone
        layers = backbone.config().num_hidden_layers
        if self.layer is not None and not 0 <= self.layer <= layers:
            raise ValueError(f"HiddenStates: layer {self.layer} does not exist, this backbone has 0 to {layers}")
        return backbone.hidden_size

    def raw(self, batch: Batch) -> Tensor:
        """Returns [B, d] fp32."""
        tokens, lengths = prompt_tokens(batch)
        texts = tokens.split(lengths.tolist())
        if not self.keep or is_sharded(self._trunk):
            return self._states(texts)
        keys = [self._key(text) for text in texts]
        vectors: dict[str, Any] = {key: self._kept.get(key) for key in keys}
        missing = {key: text for key, text in zip(keys, texts, strict=True) if vectors[key] is None}
        if missing:
            for key, state in zip(missing, self._states(list(missing.values())).cpu().numpy(), strict=True):
                self._kept.put(key, state)
                vectors[key] = state
        return torch.from_numpy(numpy.stack([vectors[key] for key in keys])).to(tokens.device)

    def _key(self, text: Tensor) -> str:
        """Names a prompt's vector, by its tokens and by what they go through."""
        if not self._base:
            self._base = f"{self.fingerprint()} in {next(self.bound.model.parameters()).dtype}"
        return EmbeddingCache.key(self._base, str(text.tolist()))

    @property
    def _trunk(self) -> nn.Module:
        """What the prompt goes through: all of a model but the decoder that writes an encoder's answers."""
        backbone, model, _ = self.bound
        return model.get_encoder() if backbone.kind == "seq2seq" else model  # pyright: ignore[reportCallIssue]

    def _states(self, texts: Sequence[Tensor]) -> Tensor:
        """Returns the pooled states [N, d] of prompts, each of them [tokens]."""
        lengths = [len(text) for text in texts]
        trunk, found = self._trunk, self.center.new_empty(len(texts), len(self.center), dtype=torch.float32)
        shape = Shape(len(texts), max(lengths)) if is_sharded(trunk) else shape_on(found.device)
        with self.bound.context.disabled(), _evaluating(trunk):
            for rows in passes(lengths, shape):
                found[rows] = self._pooled(trunk, [texts[row] for row in rows], shape.step)
        return found

    def _pooled(self, trunk: nn.Module, texts: Sequence[Tensor], step: int) -> Tensor:
        """Returns the pooled states [B, d] of one pass."""
        # Right padding after the prompt alone: positions count from 0 and an answer is not there to be seen.
        input_ids, mask = padded(texts, step)
        lengths = mask.sum(1)
        inputs = {"input_ids": input_ids, "attention_mask": mask.long(), **_savings(trunk)}
        states = enter(self.bound.model, self._exit.states, trunk, **inputs)
        if self.pooled_by == "last":
            return states[torch.arange(len(lengths), device=lengths.device), lengths - 1].float()
        return mean_by_row(states[mask], lengths)

    @property
    def pooled_by(self) -> Literal["mean", "last"]:
        """The pooling, "auto" resolved."""
        if self.pooling != "auto":
            return self.pooling
        backbone = self.bound.backbone
        decoder = backbone.kind == "causal" or (isinstance(backbone, Classifier) and backbone.pooled_by == "last")
        return "last" if decoder else "mean"

    def fingerprint(self) -> str:
        """Class, arguments and backbone weights."""
        how = "" if self.pooled_by == "mean" else f", pooling={self.pooled_by}"
        return f"HiddenStates(layer={self.layer}{how}) of {self.base_fingerprint()}"


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
