"""Embedders: how a prompt becomes the vector that a semantic prior reads.

The default costs one table lookup (`InputEmbeddings`); `HiddenStates` runs the frozen backbone once more, up to the
layer that it reads, `TextEncoder` a second model, `TfIdf` none.
"""

from moe_peft.embedders.backbone import HiddenStates, InputEmbeddings
from moe_peft.embedders.base import Embedder
from moe_peft.embedders.text import TextEncoder, TfIdf

__all__ = ["Embedder", "HiddenStates", "InputEmbeddings", "TextEncoder", "TfIdf"]
