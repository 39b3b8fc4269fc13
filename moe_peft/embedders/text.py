"""Embedders that read the prompt as text: a Hugging Face sentence encoder, or hashed TF-IDF.

Where a batch has no `text` (generation), the prompt's tokens are decoded by the backbone's tokenizer.
Shapes: B rows, S tokens, d embedding width.
"""

import hashlib
from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy
import torch
from torch import Tensor
from torch.nn import functional

from moe_peft.batch import Batch
from moe_peft.embedders.base import Embedder, exact, mean_by_row, prompt_rows
from moe_peft.embedders.cache import EmbeddingCache
from moe_peft.embedders.passes import padded, passes, shape_on


class _Encoder(NamedTuple):
    tokenizer: Any
    model: Any
    digest: str


class TextEncoder(Embedder):
    """A Hugging Face encoder: mean pooling over the attention mask, then unit length.

    The encoder is loaded when first used and is not part of the checkpoint; embeddings are cached by content.

    Args:
        name: hub id, local folder, or `package:<module>/<folder>` for an encoder inside an installed package.
        max_length: tokens after which a text is cut.
        prefix: put before every text (nomic-embed-text: "clustering: ").
        cache_dir: folder of cached embeddings; "auto" is `embeddings` in the project's cache, null is memory only.
    """

    def __init__(self, name: str, max_length: int = 512, prefix: str = "", cache_dir: str | None = "auto") -> None:
        super().__init__()
        if max_length < 1:
            raise ValueError(f"max_length is {max_length}: an encoder needs at least 1 token")
        self.name, self.max_length, self.prefix, self.cache_dir = name, max_length, prefix, cache_dir

    def _width(self) -> int:
        config = self._read("AutoConfig")
        limit = getattr(config, "max_position_embeddings", None)
        if limit is not None and self.max_length > limit:
            raise ValueError(f"max_length is {self.max_length}, but {self.name!r} has {limit} positions: lower it")
        return config.hidden_size

    def raw(self, batch: Batch) -> Tensor:
        """Returns [B, d] fp32, unit length."""
        texts = [self.prefix + text for text in _texts(self, batch)]
        keys = [EmbeddingCache.key(self.fingerprint(), text) for text in texts]
        known = {key: vector for key in set(keys) if (vector := self._cache.get(key)) is not None}
        missing = {key: text for key, text in zip(keys, texts, strict=True) if key not in known}
        for key, vector in zip(missing, self._encode(list(missing.values())), strict=True):
            self._cache.put(key, vector)
            known[key] = vector
        return torch.from_numpy(numpy.stack([known[key] for key in keys])).to(self.center.device)

    def fingerprint(self) -> str:
        """Class, arguments and the encoder's weights and vocabulary; the name is a path and says nothing."""
        return f"TextEncoder(max_length={self.max_length}, prefix={self.prefix!r}) of {self._encoder.digest}"

    def _encode(self, texts: Sequence[str]) -> list[numpy.ndarray]:
        """Runs the encoder; returns [d] vectors in the order of `texts`."""
        if not texts:
            return []
        vectors: list[numpy.ndarray] = [numpy.empty(0)] * len(texts)
        cut = self._encoder.tokenizer(list(texts), truncation=True, max_length=self.max_length)["input_ids"]
        tokens = [torch.tensor(ids, device=self.center.device) for ids in cut]
        for rows in passes([len(ids) for ids in tokens], shape_on(self.center.device)):
            encoded = self._run([tokens[row] for row in rows]).cpu().numpy()
            for row, vector in zip(rows, encoded, strict=True):
                vectors[row] = vector
        return vectors

    def _run(self, texts: Sequence[Tensor]) -> Tensor:
        """Returns the vectors [B, d] of one pass over token ids, each [tokens]."""
        tokenizer, model, _ = self._encoder
        device = self.center.device
        # Encoders that count positions by their pad token need that one.
        input_ids, mask = padded(texts, shape_on(device).step, tokenizer.pad_token_id or 0)
        with exact(device):
            hidden = model.to(device)(input_ids=input_ids, attention_mask=mask.long()).last_hidden_state
            return functional.normalize(mean_by_row(hidden[mask], mask.sum(1)), dim=-1)

    @cached_property
    def _cache(self) -> EmbeddingCache:
        return EmbeddingCache.at(self.cache_dir)

    @property
    def _encoder(self) -> _Encoder:
        # A plain tuple in the instance's dict: as a submodule the encoder would enter the checkpoint.
        if "_loaded" not in self.__dict__:
            # A new pooler may draw weights: whether the encoder was needed must not change a run's random numbers.
            with torch.random.fork_rng(devices=[]):
                model = self._read("AutoModel", dtype=torch.float32).requires_grad_(False).eval()
            tokenizer = self._read("AutoTokenizer")
            self.__dict__["_loaded"] = _Encoder(tokenizer, model, _digest(tokenizer, model))
        return self.__dict__["_loaded"]

    def _read(self, auto_class: str, **options: torch.dtype) -> Any:
        """Calls `from_pretrained`, turning a missing encoder into one line."""
        import transformers

        from moe_peft.files import resolve_name

        try:
            return getattr(transformers, auto_class).from_pretrained(resolve_name(self.name), **options)
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(
                f"TextEncoder: name {self.name!r} cannot be read ({reason}): give an encoder's folder"
            ) from None


class TfIdf(Embedder):
    """Hashed bag of words weighted by inverse document frequency: no second model, words must match literally.

    Args:
        features: hash buckets, the embedding's width.
    """

    idf: Tensor
    """[features] fp32."""

    def __init__(self, features: int = 4096) -> None:
        super().__init__()
        if features < 1:
            raise ValueError(f"features is {features}: TF-IDF needs at least 1 hash bucket")
        self.features = features

    def _width(self) -> int:
        self._create("idf", self.features)
        return self.features

    def fit(self, batches: Sequence[Batch]) -> Tensor:
        """Fits the document frequencies, then the centre; see `Embedder.fit`."""
        with exact(self.idf.device):
            present = [self._counts(batch) > 0 for batch in batches]
            total = sum(len(rows) for rows in present)
            frequency = sum((rows.sum(0) for rows in present), torch.zeros_like(self.idf))
            # Smoothed as in scikit-learn's TfidfTransformer.
            self.idf.copy_(torch.log((1 + total) / (1 + frequency)) + 1)
        return super().fit(batches)

    def raw(self, batch: Batch) -> Tensor:
        """Returns [B, features] fp32, unit length."""
        return functional.normalize(self._counts(batch) * self.idf, dim=-1)

    def fingerprint(self) -> str:
        """Class and arguments: nothing else enters, the frequencies are state."""
        return f"TfIdf(features={self.features})"

    def _counts(self, batch: Batch) -> Tensor:
        from sklearn.feature_extraction.text import HashingVectorizer

        # Plain counts: no signs, no normalisation, whatever scikit-learn's stubs say about None.
        options: dict[str, Any] = {"alternate_sign": False, "norm": None, "dtype": numpy.float32}
        counts: Any = HashingVectorizer(n_features=self.features, **options).transform(_texts(self, batch))
        return torch.from_numpy(counts.toarray()).to(self.idf.device)


def _texts(embedder: Embedder, batch: Batch) -> list[str]:
    """Returns the batch's B prompts as text, decoded where the batch has none."""
    if "text" in batch:
        return batch["text"]
    tokenizer = embedder.bound.backbone.tokenizer()
    return [
        tokenizer.decode(ids[mask].tolist(), skip_special_tokens=True)
        for ids, mask in zip(*prompt_rows(batch), strict=True)
    ]


def _digest(tokenizer: Any, model: Any) -> str:
    """Hashes vocabulary and weights: what a path or a hub id stands for today."""
    digest = hashlib.sha256(repr(sorted(tokenizer.get_vocab().items())).encode())
    for name, tensor in sorted(model.state_dict().items()):
        # Unused here, and drawn anew at every load where the files lack it.
        if name.startswith("pooler."):
            continue
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
