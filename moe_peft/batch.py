"""What a batch is: the one structure that passes from the data module to a method.

Shapes: B rows of the micro-batch (in evaluation: one per scored option), S prompt + answer tokens, L decoder tokens.
"""

import re
from typing import TypedDict

import torch
from torch import Tensor

IGNORE_INDEX = -100
"""Label of a token that must not enter the loss (prompt and padding)."""
# The inputs of a decoder's linears are decoder states, but for cross-attention's keys and values.
CROSS_KEYS = re.compile(
    r".*(EncDecAttention|encoder_attn|cross_?attn|crossattention)\.(?:.*\.)?(k|v|k_proj|v_proj|key|value)"
)


class Batch(TypedDict, total=False):
    """Tensors and row identities of one micro-batch; keys that a task kind does not need are absent."""

    input_ids: Tensor
    """[B, S] int64. Causal LM: prompt and answer, left-padded. Seq2seq and classifier: the prompt."""
    attention_mask: Tensor
    """[B, S] int64, 1 for real tokens."""
    prompt_mask: Tensor
    """[B, S] bool, True for the prompt's tokens: what a semantic prior may read."""
    labels: Tensor
    """Causal LM [B, S], seq2seq [B, L]: answer token ids, `IGNORE_INDEX` elsewhere; absent without answers."""
    task_id: Tensor
    """[B] int64, index into the data module's tasks."""
    target: Tensor
    """[B] class index (int64) or value (float32): classifier backbones with a head per task."""
    row_id: list[str]
    """B row ids, `<task>/<id>`."""
    text: list[str]
    """B prompts as text, for embedders that read text."""
    rows_share: float
    """Rows of the *global* batch / (ranks x accumulation steps): divide the row losses' sum by it."""
    tokens_share: float
    """Answer tokens of the global batch / (ranks x accumulation steps)."""
    task_share: Tensor
    """[B] rows of the row's own task in the *global* batch / (ranks x accumulation steps)."""
    option_of: Tensor
    """[B, S] int64, causal evaluation: options lie side by side behind their row's prompt; k + 1 for a token of option
    k, 0 for prompt and padding. Seq2seq evaluation has one sequence per option instead, a row's options consecutive."""
    rows: list[dict]
    """Evaluation: the plain rows (task schema), in batch order."""


def real_tokens(batch: Batch, slot: str, seq2seq: bool) -> Tensor:
    """Returns which positions of a linear's input are no padding [B, S], bool.

    Args:
        batch: as it went through the model, with labels where that has a decoder of its own.
        slot: the linear's name in the model.
        seq2seq: whether the model is an encoder-decoder, whose decoder sees the answers.
    """
    if seq2seq and ".decoder." in f".{slot}" and not CROSS_KEYS.fullmatch(slot):
        return batch["labels"] != IGNORE_INDEX
    return batch["attention_mask"].bool()


def content_key(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Hashes the real tokens of every row, whatever its padding.

    Args:
        input_ids: [B, S] token ids.
        attention_mask: [B, S], 1 for real tokens.

    Returns:
        [B] int64: a hash of each row's tokens and their order (wrapping arithmetic), equal for left and right padding.
    """
    mask = attention_mask.to(torch.int64)
    position = mask.cumsum(1)
    mixed = (input_ids + 1) * 0x9E3779B1 + position * 0x85EBCA77
    mixed = (mixed ^ (mixed >> 15)) * 0x2C1B3C6D
    mixed = mixed ^ (mixed >> 13)
    return ((mixed * (position * 2 + 1)) * mask).sum(1)
