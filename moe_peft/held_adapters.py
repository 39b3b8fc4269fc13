"""The adapters that a plain Hugging Face model holds, of which one is active: added, switched, folded in, taken off."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

from torch import nn

from moe_peft.call_routing import CallRouting
from moe_peft.interop.library import adapter_on, as_it_is
from moe_peft.layers.injection import output_head, place
from moe_peft.methods.base import MultitaskModule
from moe_peft.quirks import HeadInput

DEFAULT = "default"


class HeldAdapters(nn.Module):
    """A plain model and its adapters; `AdaptedModel` answers with them.

    Args:
        model: the plain model; it is changed in place, and `unload` gives it back.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.adapters: dict[str, MultitaskModule] = {}
        """By name; each is a method on this model."""
        self.active_adapter: str | None = None
        self._restore, self._calls = as_it_is(model), CallRouting(model)
        head = output_head(model)
        self._head = None if head is None else head.register_forward_pre_hook(HeadInput())

    def train(self, mode: bool = True) -> Self:
        """Sets the mode of the adapters; the frozen model stays in eval mode."""
        self.training = mode
        for module in self.adapters.values():
            module.train(mode)
        return self

    @property
    def active(self) -> MultitaskModule | None:
        """The active adapter's method; None for the bare model."""
        return None if self.active_adapter is None else self.adapters[self.active_adapter]

    def load_adapter(self, folder: str | Path, name: str = DEFAULT) -> None:
        """Adds an adapter and makes it the active one.

        Args:
            folder: see `load_adapter` of the package.
            name: what it is called here.

        Raises:
            ValueError: the name is taken, or see there; the model is as before then.
        """
        if name in self.adapters:
            raise ValueError(f"name: there is an adapter {name!r} already; delete_adapter it, or choose another name")
        before = self.active_adapter
        self.set_adapter(None)
        try:
            self.adapters[name] = self._calls.module = adapter_on(self.model, folder)
            self.active_adapter = name
            self._enable(not self._calls.disabled)
        finally:
            if self.active_adapter is None:
                self.set_adapter(before)

    def set_adapter(self, name: str | None) -> None:
        """Makes another adapter the active one; None leaves the bare model.

        Raises:
            ValueError: no adapter has that name.
        """
        if name is not None and name not in self.adapters:
            raise ValueError(f"name: there is no adapter {name!r}; use one of {', '.join(self.adapters) or 'none'}")
        if self.active is not None:
            place(self.model, {slot: layer.base for slot, layer in self.active.adapted.items()})
        self.active_adapter = name
        self._calls.module, self._calls.routed_as = self.active, None
        if self.active is not None:
            self.active.context.end()
            place(self.model, self.active.adapted)

    def delete_adapter(self, name: str) -> None:
        """Forgets an adapter; where it is the active one, the model is bare.

        Raises:
            ValueError: no adapter has that name.
        """
        if name == self.active_adapter:
            self.set_adapter(None)
        elif name not in self.adapters:
            raise ValueError(f"name: there is no adapter {name!r}; use one of {', '.join(self.adapters) or 'none'}")
        del self.adapters[name]

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Within: the bare model, whichever adapter is active."""
        before, self._calls.disabled = self._calls.disabled, True
        self._enable(False)
        try:
            yield
        finally:
            self._calls.disabled = before
            self._enable(not before)

    def _enable(self, enabled: bool) -> None:
        for module in self.adapters.values():
            module.context.enabled = enabled

    def unload(self) -> nn.Module:
        """Returns the plain model as it was, with nothing of this left on it."""
        self.set_adapter(None)
        self._calls.remove()
        if self._head is not None:
            self._head.remove()
        self._restore()
        return self.model

    def merge_and_unload(self, task: str | int | None = None) -> nn.Module:
        """Returns the plain model with the active adapter folded into its weights.

        Args:
            task: by name or id; may be left out by a method that treats all tasks alike.

        Raises:
            ValueError: no active adapter, no such task, or a method that cannot be merged.
        """
        if self.active is None:
            raise ValueError("merge_and_unload: no adapter is active; call set_adapter first")
        self.active.merge(task)
        return self.unload()

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """Moves or casts the inactive adapters too."""
        for module in self.adapters.values():
            for owner in (module, *module.adapted.values()):
                owner._apply(fn)
        return super()._apply(fn, recurse)
