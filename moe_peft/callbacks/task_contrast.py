"""MoRE's contrastive loss: a row's representation is drawn to its own task's embedding and away from the others.

    L = mean over rows and linears of  -log softmax_t(cos(h, e_t) / τ)[own task]

h is taken from the adapted linear's own input, inside its forward (arXiv 2505.22694; constants and the minus sign as in
the official code). Every row meets all T embeddings and no other row, so nothing is gathered across processes.
"""

from typing import Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.nn.functional import cross_entropy

from moe_peft.batch import CROSS_KEYS, IGNORE_INDEX, Batch
from moe_peft.layers.representation import Representation, cosines, represent
from moe_peft.methods.base import MultitaskModule


class TaskContrast(Callback):
    """Adds the contrastive task-embedding loss to any method that has task embeddings; training only.

    Args:
        weight: of the term.
        temperature: τ.
        representation: a row's vector: its "first_token" (official code; the start token in most decoders), the
            "mean" over its prompt, or the prompt's "last_token". A decoder's states are those of the answer.
        detach: keep the gradient from reaching earlier layers through h.
        layers: "all" adapted linears, or those of the "encoder" (official code) where the backbone has one.

    Raises:
        ValueError: a weight or temperature that is not positive.
    """

    def __init__(
        self,
        weight: float = 0.1,
        temperature: float = 0.05,
        representation: Representation = "mean",
        detach: bool = False,
        layers: Literal["all", "encoder"] = "all",
    ) -> None:
        if weight <= 0 or temperature <= 0:
            raise ValueError(
                f"TaskContrast: weight {weight} and temperature {temperature} must be positive; "
                "leave the callback out to train without it"
            )
        self.weight, self.temperature, self.detach, self.layers = weight, temperature, detach, layers
        self.representation: Representation = representation
        self._module: MultitaskModule | None = None
        self._batch: Batch | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Asks the adapted layers to compare their inputs with the task embeddings.

        Raises:
            ValueError: the method has no task embeddings, or none where `layers` wants them.
        """
        assert isinstance(pl_module, MultitaskModule)
        self._module = pl_module
        slots = [slot for slot, layer in pl_module.adapted.items() if hasattr(layer.router, "task_embeddings")]
        if not slots:
            raise ValueError(f"TaskContrast: {type(pl_module).__name__} has no task embeddings; remove the callback")
        if self.layers == "encoder" and pl_module.backbone.kind == "causal":
            raise ValueError(
                "TaskContrast: layers 'encoder', but a decoder has none (its first token says nothing either); "
                "use layers: all and representation: mean"
            )
        if self.layers == "encoder" and all(self._in_decoder(slot) for slot in slots):
            raise ValueError("TaskContrast: no linear of the encoder is adapted; set layers: all, or adapt some")
        pl_module.context.contrast = self.row_losses
        pl_module.representation = self.representation

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        """Keeps the batch at hand: its masks say which tokens count."""
        self._batch = batch

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lets the layers go."""
        assert isinstance(pl_module, MultitaskModule)
        pl_module.context.contrast, self._module, self._batch = None, None, None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Lets the layers go, as no end of the fit follows."""
        self.on_fit_end(trainer, pl_module)

    def row_losses(self, slot: str, x: Tensor, embeddings: Tensor) -> Tensor | None:
        """Returns a linear's loss per row [B], None where it takes no part; called by the adapted layer.

        Args:
            slot: the linear's name.
            x: [B, S, D] its input.
            embeddings: [T, d].
        """
        batch = self._batch
        assert batch is not None
        mask = self.mask(slot, batch)
        if mask is None:
            return None
        with torch.autocast(x.device.type, enabled=False):
            h = represent(x.detach() if self.detach else x, mask, self.representation)
            return cross_entropy(cosines(h, embeddings) / self.temperature, batch["task_id"], reduction="none")

    def mask(self, slot: str, batch: Batch) -> Tensor | None:
        """Returns which of a linear's input positions count [B, S]; None where it takes no part."""
        in_decoder = self._in_decoder(slot)
        if in_decoder and self.layers == "encoder":
            return None
        if not in_decoder or CROSS_KEYS.fullmatch(slot):
            return batch["prompt_mask"]
        lengths = (batch["labels"] != IGNORE_INDEX).sum(1, keepdim=True)
        return torch.arange(batch["labels"].shape[1], device=lengths.device) < lengths

    def _in_decoder(self, slot: str) -> bool:
        assert self._module is not None
        return self._module.backbone.kind == "seq2seq" and ".decoder." in f".{slot}"

    def loss_terms(self, module: MultitaskModule, batch: Batch) -> dict[str, Tensor]:
        """The weighted mean over linears and rows of the global batch."""
        losses = torch.stack(list(module.context.terms("contrast").values()))
        return {"contrast": self.weight * losses.mean(0).sum() / batch["rows_share"]}
