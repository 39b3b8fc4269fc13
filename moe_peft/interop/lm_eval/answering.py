"""What lm-eval wants of a batch: every option's log-likelihood, or texts that end where they should.

Shapes: B rows, S tokens, N tokens of options.
"""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from torch import Tensor
from transformers import StoppingCriteria

from moe_peft.batch import Batch
from moe_peft.methods.base import MultitaskModule
from moe_peft.methods.scoring import answer_logits, packed_logits, token_nll

Answer = tuple[float, bool]
"""A continuation's summed log-likelihood, and whether it is what greedy decoding gives."""


@torch.no_grad()
def option_answers(module: MultitaskModule, batch: Batch, sizes: Sequence[int]) -> list[list[Answer]]:
    """Scores every option of every row as the package's own evaluation does (`scoring.option_scores`).

    Args:
        module: the adapter.
        batch: an evaluation batch, which has begun.
        sizes: the options of each row.
    """
    starts = [0, *accumulate(sizes)]
    if "option_of" in batch:
        found = packed_logits(module.built(), batch)
        first = torch.tensor(starts, device=found.rows.device)[found.rows]
        which = first + batch["option_of"][found.rows, found.columns] - 1
    else:
        found = answer_logits(module.backbone, module.built(), batch)
        which = found.rows

    def summed(values: Tensor) -> Tensor:
        """Sums [N] values of tokens by option, all rows' options in a row."""
        return values.new_zeros(starts[-1]).index_put((which,), values, accumulate=True)

    scores = summed(-token_nll(found.logits, found.targets)).tolist()
    missed = summed((found.logits.argmax(-1) != found.targets).float()).tolist()
    answers = [(score, misses == 0) for score, misses in zip(scores, missed, strict=True)]
    return [answers[start : start + size] for start, size in zip(starts, sizes, strict=False)]


class Generation(NamedTuple):
    """How to continue a prompt."""

    until: list[str]
    """A continuation ends before the first of these texts."""
    new_tokens: int
    """At most so many."""
    options: dict[str, Any]
    """Further arguments of `generate`."""

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> "Generation":
        """Reads lm-eval's arguments; greedy where they ask for no sampling."""
        options: dict[str, Any] = dict(normalize_gen_kwargs(dict(given)))
        until, new_tokens = options.pop("until"), options.pop("max_gen_toks")
        if not options["do_sample"]:
            options.pop("temperature", None)
        return cls([text for text in until if text], new_tokens, options)


class StopTexts(StoppingCriteria):
    """Ends a row once its new text holds a stop text.

    Args:
        tokenizer: decodes.
        texts: the stop texts.
        start: where the new tokens begin.
    """

    def __init__(self, tokenizer: Any, texts: Sequence[str], start: int) -> None:
        self.tokenizer, self.texts, self.start = tokenizer, texts, start
        self.tokens = max(len(text.encode()) for text in texts) + 1  # a token has a byte at least

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        """Returns [B] bool, whether a row ends here."""
        ends = self.tokenizer.batch_decode(input_ids[:, self.start :][:, -self.tokens :])
        found = [any(text in end for text in self.texts) for end in ends]
        return torch.tensor(found, device=input_ids.device)


@torch.no_grad()
def continuations(module: MultitaskModule, batch: Batch, how: Generation) -> list[str]:
    """Continues every prompt of a batch, which has begun."""
    tokenizer, model = module.backbone.tokenizer(), module.built()
    start = batch["input_ids"].shape[1] if module.backbone.kind == "causal" else 1
    ids = model.generate(  # type: ignore[operator]
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        max_new_tokens=how.new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        stopping_criteria=[StopTexts(tokenizer, how.until, start)] if how.until else None,
        **how.options,
    )
    texts = tokenizer.batch_decode(ids[:, start:], skip_special_tokens=True)
    return [postprocess_generated_text(text, how.until, None) for text in texts]
