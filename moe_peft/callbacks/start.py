"""A fit that begins with a LoRA of somebody else's: the method is that LoRA until the first step."""

import logging

from lightning.pytorch import Callback, LightningModule, Trainer

from moe_peft.interop.lora_import import read_lora
from moe_peft.interop.start import start_from
from moe_peft.methods.base import MultitaskModule

logger = logging.getLogger(__name__)


class StartFrom(Callback):
    """Starts a fit from a LoRA in Hugging Face PEFT's files; a resumed fit goes on instead.

    LoRA, MoRE and Intuition-MoR1E (TRex with mode rank1) begin as exactly that LoRA, and learn in all their ranks from
    there; TTLoRA begins with what TT-SVD leaves of it, whose error is told. The base, its linears and their sizes are
    checked.

    Args:
        folder: where the LoRA lies, or its id on a hub.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes over, unless a checkpoint of this run itself was restored (which no earlier hook can tell).

        Raises:
            ValueError: no such LoRA, or one that does not fit.
        """
        if trainer.ckpt_path is not None:
            return
        assert isinstance(pl_module, MultitaskModule)
        try:
            started = start_from(pl_module, read_lora(self.folder))
        except ValueError as error:
            raise ValueError(f"StartFrom: {error}") from None
        if trainer.is_global_zero:
            logger.info("%s", started)
