"""What every embedder is: a raw vector per prompt, then centring and normalisation with a fitted state.

    e = (raw - center) / ||raw - center||          raw, center, e [d]

Raw sentence vectors share one large common direction; without centring all priors of a batch look alike.
The fitted state is persistent buffers of fixed shape, so it travels in the checkpoint; the backbone is held by
reference and never becomes a submodule, so it does not. Shapes: B rows, S tokens, N texts, d embedding width.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from moe_peft.batch import IGNORE_INDEX, Batch
from moe_peft.fingerprint import fingerprint

if TYPE_CHECKING:
    from moe_peft.backbones import Backbone
    from moe_peft.context import RoutingContext


class Bound(NamedTuple):
    """What an embedder may read: a plain tuple, so that `nn.Module` does not register the model as a child."""

    backbone: "Backbone"
    model: nn.Module
    context: "RoutingContext"


class Embedder(nn.Module):
    """Base class: subclasses give `raw`, their width, and what identifies them."""

    center: Tensor
    """[d] fp32, mean raw vector of the training texts."""
    fitted: Tensor
    """[] bool."""

    def __init__(self) -> None:
        super().__init__()
        self._bound: Bound | None = None
        self._base_fingerprint = ""

    @property
    def bound(self) -> Bound:
        """The backbone, model and context given to `bind`."""
        if self._bound is None:
            raise ValueError(f"{type(self).__name__} is not bound: call bind(backbone, model, context) first")
        return self._bound

    def bind(self, backbone: "Backbone", model: nn.Module, context: "RoutingContext") -> None:
        """Takes references to the loaded model and creates the fitted state's buffers on the model's device.

        Binding again keeps the fitted state and replaces the references.

        Raises:
            ValueError: an argument does not fit this backbone.
        """
        self._bound, self._base_fingerprint = Bound(backbone, model, context), ""
        self._create("center", self._width())
        self._create("fitted")

    def _create(self, name: str, *shape: int) -> None:
        if name in self._buffers:
            return
        dtype = torch.float32 if shape else torch.bool
        device = input_embeddings(self.bound.model).weight.device
        self.register_buffer(name, torch.zeros(shape, dtype=dtype, device=device))

    def _width(self) -> int:
        """Returns d."""
        raise NotImplementedError

    def raw(self, batch: Batch) -> Tensor:
        """Returns the uncentred embeddings [B, d] fp32 of the batch's prompts."""
        raise NotImplementedError

    def fingerprint(self) -> str:
        """Identifies class, arguments and frozen weights: equal fingerprints give equal embeddings."""
        raise NotImplementedError

    def base_fingerprint(self) -> str:
        """Returns the frozen base's own, taken once per binding: later the base may be cut, or merged."""
        if not self._base_fingerprint:
            self._base_fingerprint = fingerprint(self.bound.model)
        return self._base_fingerprint

    def fit(self, batches: Sequence[Batch]) -> Tensor:
        """Fits the centre to training prompts.

        Args:
            batches: N prompts in all.

        Returns:
            [N, d] fp32, their centred and normalised embeddings, in order.

        Raises:
            ValueError: there is no prompt.
        """
        if not batches:
            raise ValueError("batches is empty: an embedder needs at least one training text")
        with exact(self.center.device):
            vectors = torch.cat([self.raw(batch) for batch in batches])
            # Summed in fp64, so that the order of the texts does not show in fp32.
            self.center.copy_(vectors.double().mean(0))
            self.fitted.fill_(True)
            return functional.normalize(vectors - self.center, dim=-1)

    def forward(self, batch: Batch) -> Tensor:
        """Returns the centred, normalised embeddings [B, d] fp32 of the batch's prompts.

        Raises:
            ValueError: the embedder was neither fitted nor restored from a checkpoint.
        """
        if not self.fitted:
            raise ValueError(
                f"{type(self).__name__} is not fitted: add the SemanticPriorFit callback or load a checkpoint"
            )
        with exact(self.center.device):
            return functional.normalize(self.raw(batch) - self.center, dim=-1)


@contextlib.contextmanager
def exact(device: torch.device) -> Iterator[None]:
    """Within: no gradients and no autocast, so that training, fitting and inference give the same embeddings."""
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


def input_embeddings(model: nn.Module) -> nn.Embedding:
    """Returns the model's token embedding layer."""
    return model.get_input_embeddings()  # pyright: ignore[reportCallIssue]


def prompt_rows(batch: Batch) -> tuple[Tensor, Tensor]:
    """Returns the token ids [B, S] and a mask [B, S] bool, True for the prompt's real tokens.

    Raises:
        ValueError: the batch lacks its tokens, or a prompt is empty.
    """
    if "input_ids" not in batch or "attention_mask" not in batch:
        raise ValueError("batch has no input_ids or attention_mask: a semantic prior reads the prompt's tokens")
    input_ids, mask = batch["input_ids"], batch["attention_mask"].bool()
    if "prompt_mask" in batch:
        mask = mask & batch["prompt_mask"].bool()
    elif "labels" in batch and batch["labels"].shape == mask.shape:
        mask = mask & (batch["labels"] == IGNORE_INDEX)
    filled = mask.any(1)
    if not filled.all():
        raise ValueError(f"batch: row {int(filled.int().argmin())} has no prompt tokens, so it has no embedding")
    return input_ids, mask


def prompt_tokens(batch: Batch) -> tuple[Tensor, Tensor]:
    """Returns the prompts' token ids [n], rows one after another, and their lengths [B]."""
    input_ids, mask = prompt_rows(batch)
    return input_ids[mask], mask.sum(1)


def mean_by_row(vectors: Tensor, lengths: Tensor) -> Tensor:
    """Averages token vectors [n, d] per row in fp32, each row by itself: padding and batch mates cannot show.

    Args:
        vectors: [n, d], rows one after another.
        lengths: [B] tokens per row, at least 1, sum n.

    Returns:
        [B, d] fp32.
    """
    return torch.segment_reduce(vectors.float(), "mean", lengths=lengths, axis=0)
