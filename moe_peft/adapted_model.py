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
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from moe_peft.backbones import Classifier
from moe_peft.batch import Batch
from moe_peft.call_routing import Prompts
from moe_peft.held_adapters import DEFAULT, HeldAdapters
from moe_peft.methods.merging import task_number
from moe_peft.methods.scoring import pooled_features
from moe_peft.quirks import past_of


class AdaptedModel(HeldAdapters):
    """A Hugging Face model with adapters, of which one is active; all else is the model's own.

    Its parameters and state are the model's with the active adapter's linears; heads, priors and inactive adapters are
    in `adapters`, and move and cast with it.

    Args:
        model: the plain model; it is changed in place, and `unload` gives it back.
    """

    def __getattr__(self, name: str) -> Any:
        """Looks up what is not here on the model."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("model"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the model, adapted."""
        return self.model(*args, **kwargs)

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
        ids = inputs if inputs is not None else kwargs.get("input_ids")
        causal = not self.model.config.is_encoder_decoder  # type: ignore[union-attr]
        prompts = None
        if ids is not None and causal and not past_of(kwargs):
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
