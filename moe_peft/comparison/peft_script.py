"""What a user writes by hand: transformers, a LoRA of Hugging Face PEFT, AdamW, clipping; one step at a time.

Both forms of the loss are the mean over the batch's answer tokens, as the model's own loss is (B rows, S tokens).
"""

import copy
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_

from moe_peft.batch import IGNORE_INDEX, Batch


class Form(NamedTuple):
    """One way to write it."""

    adapters: Literal["fp32", "bf16"]
    """What stores the adapters over a bf16 base: PEFT's default, or autocast_adapter_dtype=False."""
    head: Literal["full", "answers"]
    """Logits of all tokens, by `labels=`; or of the tokens that have a label, by hand."""

    def __str__(self) -> str:
        return f"PEFT, {self.adapters}, {self.head}"


AS_USED = Form("fp32", "full")
"""As users run it: every default, and `labels=`."""
FORMS = (AS_USED, Form("fp32", "answers"), Form("bf16", "full"), Form("bf16", "answers"))


class PeftScript:
    """A training script without this package.

    Args:
        base: the plain model; its weights are shared, not copied.
        form: how the script is written.
        rank: r; α is 2 r.
        batches: what it trains on.
        rate: AdamW's learning rate, without decay.
        clip: largest norm of all gradients.
    """

    def __init__(
        self, base: nn.Module, form: Form, rank: int, batches: Iterator[Batch], rate: float, clip: float
    ) -> None:
        from peft import LoraConfig, get_peft_model

        own: Any = copy.deepcopy(base, {id(weight): weight for weight in base.parameters()})
        config = LoraConfig(
            r=rank, lora_alpha=2 * rank, target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM"
        )
        self.model: Any = get_peft_model(own, config, autocast_adapter_dtype=form.adapters == "fp32")
        self.form, self.batches, self.clip, self.name = form, batches, clip, str(form)
        trained = [weight for weight in self.model.parameters() if weight.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)

    @torch.no_grad()
    def start_as(self, factors: dict[str, tuple[Tensor, Tensor]]) -> None:
        """Copies start values in.

        Args:
            factors: A [r, D] and B [O, r] of every adapted linear, by its name.

        Raises:
            RuntimeError: PEFT adapts other linears.
        """
        suffix = ".lora_A.default.weight"
        names = {name.removesuffix(suffix) for name, _ in self.model.named_parameters() if name.endswith(suffix)}
        if names != {f"base_model.model.{name}" for name in factors}:
            raise RuntimeError(f"PEFT adapts {len(names)} linears, and not the same {len(factors)}")
        for name, (a, b) in factors.items():
            layer = self.model.get_submodule(f"base_model.model.{name}")
            layer.lora_A["default"].weight.copy_(a)
            layer.lora_B["default"].weight.copy_(b)

    def step(self) -> float:
        """Makes one optimizer step on the next batch and returns its loss before it."""
        loss = self.loss(next(self.batches))
        loss.backward()
        clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()

    def loss(self, batch: Batch) -> Tensor:
        """Returns the mean loss of a batch's answer tokens."""
        inputs, labels = {name: batch[name] for name in ("input_ids", "attention_mask")}, batch["labels"]
        if self.form.head == "full":
            return self.model(**inputs, labels=labels, use_cache=False).loss
        causal: Any = self.model.get_base_model()
        answers = labels[:, 1:] != IGNORE_INDEX
        hidden = causal.model(**inputs, use_cache=False).last_hidden_state[:, :-1][answers]
        return cross_entropy(causal.lm_head(hidden).float(), labels[:, 1:][answers])
