"""Which known task a prompt is most like: every adapted linear votes for the nearest of its task embeddings.

A linear compares its own input in the bare base, pooled over the prompt as the contrastive loss pools it
(`callbacks.task_contrast`), by cosine with its embeddings; the task with the most votes wins, the first one of equals.
Only linears that see the prompt vote; of an encoder-decoder those are the encoder's. Shapes: B batch, U distinct
prompts, S sequence, K known tasks, d embedding width.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from moe_peft.batch import Batch
from moe_peft.layers.representation import Representation, cosines, represent
from moe_peft.methods.scoring import causal_logits, position_ids
from moe_peft.sharding import enter

if TYPE_CHECKING:
    from moe_peft.methods.base import MultitaskModule

PADDING = -1


@torch.no_grad()
def nearest_task(module: "MultitaskModule", batch: Batch, tables: dict[str, Tensor], how: Representation) -> Tensor:
    """Returns the nearest known task of every sequence [B]; equal prompts (a row's options) get the same.

    Args:
        module: built; its adapters take no part.
        batch: of which `input_ids` and `prompt_mask` are read.
        tables: the known tasks' embeddings [K, d] by adapted linear.
        how: what a prompt's vector is.

    Raises:
        ValueError: no adapted linear sees the prompt.
    """
    ids, which = distinct_prompts(batch)
    mask = (ids != PADDING).to(torch.int64)
    votes: dict[str, Tensor] = {}

    def vote(layer: nn.Module, args: tuple[Any, ...]) -> None:
        slot, x = str(layer.slot), args[0]
        if x.shape[:-1].numel() == mask.numel():
            with torch.autocast(x.device.type, enabled=False):
                votes[slot] = cosines(represent(x, mask, how), tables[slot].to(x.device)).argmax(1)

    hooks = [module.adapted[slot].register_forward_pre_hook(vote) for slot in tables]
    training = module.training
    try:
        with module.context.disabled():
            read_prompts(module.eval(), ids.clamp(min=0), mask)
    finally:
        module.train(training)
        for hook in hooks:
            hook.remove()
    if not votes:
        raise ValueError("the nearest task needs an adapted linear that sees the prompt; extend targets, or use mean")
    known = len(next(iter(tables.values())))
    counts = nn.functional.one_hot(torch.stack(list(votes.values())), known).sum(0)
    return counts.argmax(1)[which]


def distinct_prompts(batch: Batch) -> tuple[Tensor, Tensor]:
    """Returns the prompts [U, S], padded on the right with PADDING, and which one every sequence has [B]."""
    pairs = zip(batch["input_ids"], batch["prompt_mask"].bool(), strict=True)
    padded = nn.utils.rnn.pad_sequence([ids[mask] for ids, mask in pairs], batch_first=True, padding_value=PADDING)
    return torch.unique(padded, dim=0, return_inverse=True)


def read_prompts(module: "MultitaskModule", ids: Tensor, mask: Tensor) -> None:
    """Runs the part of the model that reads prompts [U, S]."""
    model: Any = module.built()
    if module.backbone.kind == "seq2seq":
        enter(model, model.get_encoder(), input_ids=ids, attention_mask=mask)
    elif module.backbone.kind == "causal":
        rows = torch.arange(len(ids), device=ids.device)
        causal_logits(model, ids, mask, position_ids(mask), rows, torch.full_like(rows, -1))
    else:
        model(input_ids=ids, attention_mask=mask)
