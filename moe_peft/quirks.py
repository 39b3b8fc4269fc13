"""What frozen Hugging Face models need to be told before they are trained through, and what they cannot do."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from transformers.modeling_outputs import CausalLMOutputWithPast

CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
"""What the installed transformers calls a cache among a model's arguments and outputs: `cache` since 5.24."""

BLOCK_MASKED = {
    *("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi", "phi3", "olmo", "olmo2"),
    *("smollm3", "granite", "stablelm", "gpt_neox", "opt"),
}
"""Model types whose attention obeys a 4-D mask and explicit positions as given; each is tested."""


def obeys_block_mask(config: Any, max_length: int) -> bool:
    """Whether a model obeys a 4-D mask over sequences of at most `max_length` tokens.

    A sliding window that they could outgrow is left out of that mask by transformers.
    """
    window = getattr(config, "sliding_window", None)
    return config.model_type in BLOCK_MASKED and (window is None or window > max_length)


def entries(model: nn.Module) -> list[nn.Module]:
    """Returns what is called with a model's inputs: itself, and an encoder, which generate() calls past its forward."""
    return [model, model.get_encoder()] if model.config.is_encoder_decoder else [model]  # type: ignore


def input_of(args: tuple, kwargs: dict[str, Any]) -> tuple[Tensor | None, Tensor | None, bool]:
    """Returns the token ids and the mask that a model is called with, and whether the call goes on from a prefill."""
    ids = args[0] if args else kwargs.get("input_ids")
    return ids, kwargs.get("attention_mask"), kwargs.get("encoder_outputs") is not None or past_of(kwargs) > 0


def past_of(kwargs: dict[str, Any]) -> int:
    """Returns how many tokens of every row lie in the cache that a model is called with, by either of its names."""
    cache = next((kwargs[name] for name in ("cache", "past_key_values") if kwargs.get(name) is not None), None)
    return 0 if cache is None else int(cache.get_seq_length())


@contextmanager
def unhooked(modules: list[nn.Module]) -> Iterator[None]:
    """Takes off the forward pre-hooks that modules are given within."""
    before = [set(module._forward_pre_hooks) for module in modules]
    try:
        yield
    finally:
        for module, kept in zip(modules, before, strict=True):
            for key in set(module._forward_pre_hooks) - kept:
                del module._forward_pre_hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)


class HeadInput:
    """A hook that gives an output head contiguous rows, and only those that are asked for (`head_at`).

    `logits_to_keep` hands the head a slice; on a sliced 3-D input torch copies the whole vocabulary matrix once per row
    (half of a training step on SmolLM2, and gigabytes in evaluation).
    """

    at: tuple[Tensor, Tensor] | None = None
    """Rows and columns; here and not on the head, where the compiler would take every number of them for a constant."""

    def __call__(self, head: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        """Returns the input's rows."""
        return (args[0].contiguous() if self.at is None else args[0][self.at].unsqueeze(0),)


@contextmanager
def head_at(head: nn.Module, rows: Tensor, columns: Tensor) -> Iterator[None]:
    """Within: the model computes its logits at N positions only, and returns them as [1, N, V].

    Every row keeps as many positions as the longest answer needs (`logits_to_keep`); most answers are short.

    Args:
        head: the model's output head, called by the model itself, which may scale or cap what it gives.
        rows: [N].
        columns: [N] negative, counted from the sequence's end.
    """
    # A hook that comes and goes with the batch would be compiled once and for all, so one stays.
    found = [hook for hook in head._forward_pre_hooks.values() if isinstance(hook, HeadInput)]
    hook = found[0] if found else HeadInput()
    if not found:
        head.register_forward_pre_hook(hook)
    hook.at = rows, columns
    try:
        yield
    finally:
        hook.at = None


def silence_dropout(block: nn.Module) -> None:
    """Zeroes a block's own dropout rates: its training flag is on to recompute, but the frozen base never drops."""
    for name, value in vars(block).items():
        if "drop" in name and isinstance(value, float):
            setattr(block, name, 0.0)


def keep_recordable(model: nn.Module) -> None:
    """Registers what a model can record (hidden states) once more, after `fully_shard` replaced its class.

    transformers looks that up by the class's name, and without it returns no hidden states.
    """
    from transformers import modeling_utils

    modeling_utils._CAN_RECORD_REGISTRY[model] = model._can_record_outputs  # type: ignore[index]


def offload_input(block: nn.Module) -> None:
    """Lets a recomputed block's input wait for backward in the host's memory; masks and positions, which all blocks
    share, stay where they are.
    """
    recompute: Any = block._gradient_checkpointing_func

    def offloaded(*args: Any, **kwargs: Any) -> Any:
        with save_on_cpu(pin_memory=torch.cuda.is_available()):
            return recompute(*args, **kwargs)

    block._gradient_checkpointing_func = offloaded  # type: ignore[assignment]
