"""What a plain model's calls are routed by: decided at every call without a cache (a prefill), held until the next.

Shapes: B rows of a call, S tokens.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from moe_peft.batch import Batch
from moe_peft.methods.base import MultitaskModule
from moe_peft.methods.merging import task_number
from moe_peft.quirks import entries, input_of, past_of


class Prompts:
    """What `generate` was called with: the model itself sees every row once per beam or sample.

    Args:
        ids: [B, S].
        mask: [B, S], if it was given.
    """

    def __init__(self, ids: Tensor, mask: Tensor | None) -> None:
        (self.rows, self.width), self.mask = ids.shape, mask
        self.routed = False
        """Whether the rows have their facts: without a cache, every further step looks like a prefill."""


class CallRouting:
    """Publishes the routing facts of a model's calls to the method that is active on it.

    Args:
        model: the plain model; hooks on it see every call, until `remove`.
    """

    def __init__(self, model: nn.Module) -> None:
        self.module: MultitaskModule | None = None
        """The active method."""
        self.disabled = False
        """Whether the bare model answers."""
        self.tasks: list[str | int] | None = None
        self.prompt_mask: Tensor | None = None
        self.prompts: Prompts | None = None
        self.routed_as: list[int] | None = None
        """The tasks of the last prefill's rows, where they were named."""
        self._inside = False
        first, *encoder = entries(model)
        self._hooks = [
            first.register_forward_pre_hook(self._enter, with_kwargs=True),
            first.register_forward_hook(self._leave, always_call=True),
            *(entry.register_forward_pre_hook(self._enter_encoder, with_kwargs=True) for entry in encoder),
        ]

    def remove(self) -> None:
        """Takes the hooks off."""
        for hook in self._hooks:
            hook.remove()

    @contextlib.contextmanager
    def named(self, tasks: list[str | int] | None, prompt_mask: Tensor | None) -> Iterator[None]:
        """Within: calls are of these tasks; see `AdaptedModel.routing`."""
        before, self._inside = (self.tasks, self.prompt_mask), False  # an interrupt may have left it on
        self.tasks, self.prompt_mask = tasks, prompt_mask
        try:
            yield
        finally:
            self.tasks, self.prompt_mask = before

    @contextlib.contextmanager
    def generating(self, prompts: Prompts | None) -> Iterator[None]:
        """Within: calls go on from these prompts, once they have been seen."""
        before, self._inside = self.prompts, False
        self.prompts = prompts
        try:
            yield
        finally:
            self.prompts = before

    def _enter(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.begin(args, kwargs)
        self._inside = self.module is not None and self.module.context.enabled

    def _leave(self, model: nn.Module, args: tuple, output: Any) -> None:
        self._inside = False

    def _enter_encoder(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if not self._inside:  # called by generate, past the model's forward
            self.begin(args, kwargs)

    def begin(self, args: tuple, kwargs: dict[str, Any]) -> None:
        """Publishes the routing facts of a prefill's rows."""
        module = self.module
        ids, mask, cached = input_of(args, kwargs)
        prompts = self.prompts
        if module is None:
            return
        module.context.goes_on(past_of(kwargs))
        if prompts is not None and prompts.routed:
            return
        if self.disabled:
            if not cached:
                module.context.end()
            return
        if not module.context.enabled:  # the router's own look at the bare base
            return
        if cached:
            self._refuse_other_tasks(module)
            return
        routed = any(layer.depends_on_task for layer in module.adapted.values())
        if ids is None:
            if routed:
                raise ValueError("inputs_embeds: routing reads token ids; call the model with input_ids")
            return
        ids, mask = self._rows_once(ids, mask, routed)
        batch = Batch(input_ids=ids, attention_mask=mask)
        if self.prompt_mask is not None:
            if self.prompt_mask.shape != ids.shape:
                raise ValueError(
                    f"prompt_mask: it has shape {[*self.prompt_mask.shape]}, the input {[*ids.shape]}; give them alike"
                )
            batch["prompt_mask"] = self.prompt_mask.to(ids.device)
        self.routed_as = self._numbers(module, len(ids))
        if self.routed_as is not None:
            batch["task_id"] = torch.tensor(self.routed_as, device=ids.device)
        module.route_by_task = self.routed_as is not None
        module.begin(batch)
        if prompts is not None:
            prompts.routed = True

    def _numbers(self, module: MultitaskModule, rows: int) -> list[int] | None:
        """Returns the named tasks' ids, one for each row."""
        if self.tasks is None:
            return None
        if len(self.tasks) not in (1, rows):
            raise ValueError(f"routing: {len(self.tasks)} tasks for {rows} rows; name one task per row, or one for all")
        numbers = [task_number(module, task) for task in self.tasks]
        return numbers * rows if len(numbers) == 1 else numbers

    def _refuse_other_tasks(self, module: MultitaskModule) -> None:
        """Refuses a call that goes on from a prefill under other tasks than are named now."""
        held = self.routed_as
        if self.tasks is not None and self._numbers(module, len(held or self.tasks)) != held:
            of = "none" if held is None else ", ".join(module.specs[task].name for task in held)
            raise ValueError(f"routing: the last prefill's rows were of tasks {of}; prefill again under the new tasks")

    def _rows_once(self, ids: Tensor, mask: Any, routed: bool) -> tuple[Tensor, Tensor]:
        """Returns the prompts' token ids and mask [B, S], without the copies and drafts that `generate` made of them.

        Facts of B rows serve k times as many: the context interleaves them.
        """
        prompts = self.prompts
        if prompts is not None:
            if ids.shape[1] < prompts.width:
                raise ValueError(
                    f"generate: the model was given {ids.shape[1]} tokens of a prompt of {prompts.width}, and routing "
                    "needs the whole prompt at once; use no prefill_chunk_size"
                )
            once = slice(None, None, len(ids) // prompts.rows), slice(prompts.width)
            ids, given = ids[once], isinstance(mask, Tensor) and mask.dim() == 2
            mask = prompts.mask if prompts.mask is not None else mask[once] if given else mask
        if mask is None:
            return ids, torch.ones_like(ids)
        if isinstance(mask, Tensor) and mask.dim() == 2:
            return ids, mask
        if routed:
            raise ValueError("attention_mask: routing must know which tokens are real; give the mask as [rows, tokens]")
        return ids, torch.ones_like(ids)
