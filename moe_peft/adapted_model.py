"""Trained adapters on a plain Hugging Face model, without Lightning: forward, generate, switch, merge.

    model = moe_peft.load_adapter(AutoModelForCausalLM.from_pretrained(base), "exports/X")
    with model.routing(tasks=["sst2", "rte"]):
        model.generate(**tokenizer(two_texts, return_tensors="pt", padding=True), max_new_tokens=20)

What a method routes by is decided at every call without a cache (a prefill) and held until the next one. Shapes: B
rows of a call, S tokens.
"""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, Self

import torch
from torch import Tensor, nn

from moe_peft.backbones import Classifier
from moe_peft.batch import Batch
from moe_peft.call_routing import CallRouting, Prompts
from moe_peft.interop.library import adapter_on, as_it_is
from moe_peft.layers.injection import output_head, place
from moe_peft.methods.base import MultitaskModule
from moe_peft.methods.merging import task_number
from moe_peft.methods.scoring import pooled_features
from moe_peft.quirks import HeadInput

DEFAULT = "default"


class AdaptedModel(nn.Module):
    """A Hugging Face model with adapters, of which one is active; all else is the model's own.

    Its parameters and state are the model's with the active adapter's linears; heads, priors and inactive adapters are
    in `adapters`, and move and cast with it.

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

    def __getattr__(self, name: str) -> Any:
        """Looks up what is not here on the model."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("model"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the model, adapted."""
        return self.model(*args, **kwargs)

    def train(self, mode: bool = True) -> Self:
        """Sets the mode of the adapters; the frozen model stays in eval mode."""
        self.training = mode
        for module in self.adapters.values():
            module.train(mode)
        return self

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        """Recomputes in backward, every call with the routing that it had; never reentrant.

        Args:
            gradient_checkpointing_kwargs: of torch.utils.checkpoint.
        """
        own = {"use_reentrant": False, "context_fn": self._recomputation}
        self.model.gradient_checkpointing_enable((gradient_checkpointing_kwargs or {}) | own)  # type: ignore[operator]

    def _recomputation(self) -> tuple[contextlib.AbstractContextManager, contextlib.AbstractContextManager]:
        nothing = contextlib.nullcontext(), contextlib.nullcontext()
        return nothing if self.active is None else self.active.context.checkpoint_fns()

    def save_pretrained(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuses: under the adapted names no weight would be found again.

        Raises:
            ValueError: always; see there.
        """
        raise ValueError(
            "save_pretrained: an adapted model is no plain one; call merge_and_unload() or unload() first; adapters "
            "are written by tools/export.py"
        )

    push_to_hub = save_pretrained

    # ---- which adapter ----------------------------------------------------------------------------------------------

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

    # ---- routing ----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def routing(
        self, tasks: str | int | Sequence[str | int] | None = None, prompt_mask: Tensor | None = None
    ) -> Iterator[None]:
        """Within: every call's rows are of these tasks.

        Args:
            tasks: by name or id, one per row, or one for all rows. None leaves the choice to the method's own router:
                T-REX's prior and the router of a TT-LoRA MoE read the prompt, LoRA needs nothing, MoRE refuses.
            prompt_mask: [B, S] bool, for a forward over prompt and answer: which tokens are the prompt's, all that a
                router for whole prompts may read. None: all real tokens.

        Raises:
            ValueError: no active adapter, or no such task.
        """
        if self.active is None:
            raise ValueError("routing: no adapter is active; call set_adapter first")
        named = [tasks] if isinstance(tasks, str | int) else None if tasks is None else list(tasks)
        for task in named or ():
            task_number(self.active, task)
        with self._calls.named(named, prompt_mask):
            yield

    # ---- answers ----------------------------------------------------------------------------------------------------

    def generate(self, inputs: Tensor | None = None, **kwargs: Any) -> Any:
        """Calls the model's own `generate`; rows are routed once, whatever the number of beams or samples.

        Args:
            inputs: token ids [B, S], or input_ids among the other arguments.
            kwargs: of the model's `generate`.
        """
        ids, cache = inputs if inputs is not None else kwargs.get("input_ids"), kwargs.get("past_key_values")
        causal = not self.model.config.is_encoder_decoder  # type: ignore[union-attr]
        prompts = None
        if ids is not None and causal and (cache is None or not cache.get_seq_length() > 0):
            prompts = Prompts(ids, kwargs.get("attention_mask"))
        with self._calls.generating(prompts):
            return self.model.generate(inputs, **kwargs)  # type: ignore[operator]

    @torch.no_grad()
    def classify(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> list[list[float]]:
        """Returns each row's log-probabilities of its task's classes (the value of a regression task).

        Args:
            input_ids: [B, S].
            attention_mask: [B, S]; None: all tokens are real.

        Raises:
            ValueError: an adapter of a language model, which has no heads; no tasks, and no router that finds them; or
                within disable_adapter, which leaves no heads either.
        """
        if self._calls.disabled:
            raise ValueError("classify: the bare base has no heads; leave disable_adapter() first")
        module = self.active
        if module is None or module.heads is None:
            raise ValueError("classify: the active adapter has no heads; compare log-likelihoods or use generate")
        assert isinstance(module.backbone, Classifier)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        features = pooled_features(module.backbone, self.model, Batch(input_ids=input_ids, attention_mask=mask))
        tasks = module.context.get("task_id", len(features))
        if tasks is None:
            raise ValueError(
                f"classify: {type(module).__name__} has a head per task; name the rows' with routing(tasks=)"
            )
        return module.heads.scores(features, tasks)

    def _apply(self, fn: Any, recurse: bool = True) -> "AdaptedModel":
        """Moves or casts the inactive adapters too."""
        for module in self.adapters.values():
            for owner in (module, *module.adapted.values()):
                owner._apply(fn)
        return super()._apply(fn, recurse)


def load_adapter(model: nn.Module, folder: str | Path, name: str = DEFAULT) -> AdaptedModel:
    """Puts a trained adapter onto a plain Hugging Face model, or a further one onto an adapted model.

    The model's weights are frozen. All is in place: go on with what is returned.

    Args:
        model: what `from_pretrained` gave, in any dtype: the base that the adapter was trained on; or what this
            function gave.
        folder: an exported adapter (`tools/export.py --to adapter`), a run's folder, a checkpoint, a LoRA in PEFT's
            files, or a hub id of one of the two folders.
        name: what the adapter is called, for `set_adapter`.

    Raises:
        ValueError: no adapter there, a damaged one, or one of another base, shape or kind of model.
    """
    adapted = model if isinstance(model, AdaptedModel) else AdaptedModel(model)
    try:
        adapted.load_adapter(folder, name)
    except BaseException:
        if adapted is not model:
            adapted.unload()
        raise
    return adapted
