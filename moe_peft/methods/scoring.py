"""What a backbone's forward means for a batch: answer log-likelihoods, pooled features, generated text.

Shapes: B batch, S sequence, L answer tokens kept, V vocabulary, D hidden.
"""

import contextlib
import inspect
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from moe_peft.backbones import Backbone, Classifier
from moe_peft.batch import IGNORE_INDEX, Batch
from moe_peft.context import RoutingContext
from moe_peft.layers.injection import output_head
from moe_peft.quirks import head_at
from moe_peft.sharding import enter, is_sharded

CHUNK = 256
"""Tokens whose fp32 logits are held at once while scoring."""


class AnswerLogits(NamedTuple):
    """What a model gives where the N answer tokens of a batch are predicted."""

    logits: Tensor
    """[N, V] in the model's dtype."""
    targets: Tensor
    """[N] the tokens."""
    rows: Tensor
    """[N] whose they are."""
    columns: Tensor
    """[N] where they stand."""


@cache
def _accepts(model_class: type, argument: str) -> bool:
    return argument in inspect.signature(model_class.forward).parameters


def position_ids(attention_mask: Tensor) -> Tensor:
    """Counts real tokens from zero, so that left padding moves no position: [B, S] -> [B, S]."""
    return (attention_mask.cumsum(1) - 1).clamp(min=0)


def token_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood of N tokens in fp32, without an fp32 copy of all logits where no gradient is needed.

    Args:
        logits: [N, V] in the model's dtype.
        targets: [N].
    """
    if torch.is_grad_enabled():
        return cross_entropy(logits.float(), targets, reduction="none")
    parts = [
        cross_entropy(part.float(), target, reduction="none")
        for part, target in zip(logits.split(CHUNK), targets.split(CHUNK), strict=True)
    ]
    return torch.cat(parts) if parts else logits.new_zeros(0, dtype=torch.float32)


def answer_logits(backbone: Backbone, model: nn.Module, batch: Batch) -> AnswerLogits:
    """Returns the logits of every answer token; its columns are those of `labels`."""
    labels, mask = batch["labels"], batch["attention_mask"]
    rows, columns = (labels != IGNORE_INDEX).nonzero(as_tuple=True)
    if backbone.kind == "seq2seq":
        logits = model(input_ids=batch["input_ids"], attention_mask=mask, labels=labels, use_cache=False).logits
        logits = logits[rows, columns]
    else:
        before = columns - 1 - labels.shape[1]
        logits = causal_logits(model, batch["input_ids"], mask, position_ids(mask), rows, before)
    return AnswerLogits(logits, labels[rows, columns], rows, columns)


def answer_nll(backbone: Backbone, model: nn.Module, batch: Batch) -> Tensor:
    """Negative log-likelihood of every answer token.

    Returns:
        [B, S] (seq2seq: [B, L]) fp32, zero at prompt and padding.
    """
    found = answer_logits(backbone, model, batch)
    nll = torch.zeros(batch["labels"].shape, dtype=torch.float32, device=found.logits.device)
    return nll.index_put((found.rows, found.columns), token_nll(found.logits, found.targets))


def causal_logits(
    model: nn.Module, input_ids: Tensor, mask: Tensor, positions: Tensor, rows: Tensor, columns: Tensor
) -> Tensor:
    """Returns the logits [N, V] at N places, the only ones where the output head is computed (if the model calls one).

    Args:
        model: a causal language model.
        input_ids: [B, S].
        mask: [B, S], or additive [B, 1, S, S].
        positions: [B, S] position ids.
        rows: [N].
        columns: [N] negative, counted from the end.
    """
    extra: dict = {"position_ids": positions} if _accepts(type(model), "position_ids") else {}
    if _accepts(type(model), "logits_to_keep"):
        extra["logits_to_keep"] = int(-columns.min()) if len(columns) else 1
    head = output_head(model)
    with contextlib.nullcontext() if head is None else head_at(head, rows, columns):
        logits = model(input_ids=input_ids, attention_mask=mask, use_cache=False, **extra).logits
    return logits[0] if logits.shape[:2] == (1, len(rows)) else logits[rows, columns]


def option_scores(backbone: Backbone, model: nn.Module, batch: Batch) -> list[list[float]]:
    """Summed log-likelihood of every option of every row, in one forward."""
    sizes = [len(row["choices"]) for row in batch["rows"]]
    if "option_of" in batch:
        scores = packed_option_scores(model, batch)
        return [row[:size].tolist() for row, size in zip(scores, sizes, strict=True)]
    return [part.tolist() for part in (-answer_nll(backbone, model, batch).sum(1)).split(sizes)]


def packed_logits(model: nn.Module, batch: Batch) -> AnswerLogits:
    """Returns the logits of the tokens of options that lie side by side behind their prompt.

    The prompt is computed once: a block mask lets every option see the prompt and itself, and positions count only
    what a token sees, so each option's scores are those of its own sequence.
    """
    ids, option, real = batch["input_ids"], batch["option_of"], batch["attention_mask"].bool()
    order = torch.arange(ids.shape[1], device=ids.device)
    own = (option.unsqueeze(1) == 0) | (option.unsqueeze(1) == option.unsqueeze(2))
    sees = own & real.unsqueeze(1) & (order <= order.unsqueeze(1))
    before = (sees & (order < order.unsqueeze(1))) * order
    dtype = next(model.parameters()).dtype
    hidden = ~(sees | torch.eye(ids.shape[1], dtype=torch.bool, device=ids.device))
    mask = torch.zeros(hidden.shape, dtype=dtype, device=ids.device).masked_fill(hidden, torch.finfo(dtype).min)
    positions = (sees.sum(-1) - 1).clamp(min=0)
    rows, columns = (option > 0).nonzero(as_tuple=True)
    source = before.amax(-1)[rows, columns] - ids.shape[1]
    logits = causal_logits(model, ids, mask.unsqueeze(1), positions, rows, source)
    return AnswerLogits(logits, ids[rows, columns], rows, columns)


def packed_option_scores(model: nn.Module, batch: Batch) -> Tensor:
    """Scores options that lie side by side behind their prompt: [B, K], K the most options of a row."""
    found, option = packed_logits(model, batch), batch["option_of"]
    scores = torch.zeros(len(option), int(option.max()), device=option.device)
    place = found.rows, option[found.rows, found.columns] - 1
    return scores.index_put(place, -token_nll(found.logits, found.targets), accumulate=True)


def pooled_features(backbone: Classifier, model: nn.Module, batch: Batch) -> Tensor:
    """Returns the pooled last hidden state [B, D] in fp32."""
    extra = {"use_cache": False} if _accepts(type(model), "use_cache") else {}
    hidden = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], **extra).last_hidden_state
    return backbone.pool(hidden, batch["attention_mask"]).float()


@torch.no_grad()
def base_states(backbone: Backbone, model: nn.Module, context: RoutingContext, batch: Batch) -> Tensor:
    """Returns the frozen base's last hidden states [B, S, d] of a batch as it is padded, of one pass without adapters.

    Those of an encoder-decoder are its encoder's.
    """
    trunk: Any = model.get_encoder() if backbone.kind == "seq2seq" else model.base_model  # type: ignore[operator]
    mask = batch["attention_mask"]
    extra = {"position_ids": position_ids(mask), "use_cache": False}
    if backbone.kind == "classifier":  # as its features are made
        del extra["position_ids"]
    extra = {name: value for name, value in extra.items() if _accepts(type(trunk), name)}
    with context.disabled():
        return enter(model, trunk, input_ids=batch["input_ids"], attention_mask=mask, **extra).last_hidden_state


@torch.no_grad()
def generate_text(backbone: Backbone, model: nn.Module, batch: Batch, max_new_tokens: int) -> list[str]:
    """Greedy continuation of every prompt, as stripped text."""
    tokenizer = backbone.tokenizer()
    ids = enter(
        model,
        model.generate,  # type: ignore[arg-type]
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
        synced_gpus=is_sharded(model),  # a rank whose rows have ended goes on until all have
    )
    if backbone.kind == "causal":
        ids = ids[:, batch["input_ids"].shape[1] :]
    return [text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]
