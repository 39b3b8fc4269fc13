"""How routing facts reach the adapted layers of an unmodified Hugging Face model.

One plain object per model, held by reference in every adapted layer. A module's forward begins a batch, puts the
batch's facts (task ids, semantic prior, ...) and runs the model; the facts stay until the next batch begins, because
backward under gradient checkpointing runs the layers again. Every fact is tied to the batch by a content key: a fact
computed for other rows, or a model called with other rows, raises.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from moe_peft.batch import content_key

if TYPE_CHECKING:
    from moe_peft.kernels.gated import Kernels

T = TypeVar("T")


class Routing(NamedTuple):
    """What a router decided for one adapted layer: B batch, S sequence, E experts."""

    weights: Tensor
    """[B or 1, S or 1, E] non-negative weights, one per expert (or expert pair)."""
    indices: Tensor | None = None
    """[B, S, k] chosen experts where the choice is sparse."""


Contrast = Callable[[str, Tensor, Tensor], Tensor | None]
"""(slot, the layer's input [B, S, D], task embeddings [T, d]) -> a loss per row [B], or None."""


Observer = Callable[[str, Routing], None]
"""(slot, routing): is shown what a layer decided."""


class RoutingContext:
    """Facts of the batch that is being processed, and the routing that was recorded for it.

    Args:
        kernels: what computes the updates of all layers (see `kernels.gated`).
    """

    def __init__(self, kernels: "Kernels" = "auto") -> None:
        self.kernels: Kernels = kernels
        """What computes the updates of all layers."""
        self.enabled = True
        """False: every adapted layer is its bare base (see `disabled`)."""
        self.recording = False
        """True: routers leave their `Routing` in `records`, by slot. Off by default: it keeps activations alive."""
        self.records: dict[str, Routing] = {}
        self._observer: Observer | None = None
        self._recorded: set[str] = set()
        self.contrast: Contrast | None = None
        """Compares a layer's input with the task embeddings while training (set by the TaskContrast callback)."""
        self._terms: dict[str, dict[str, Tensor]] = {}
        self._held: dict[str, tuple[int | torch.Size, Any]] = {}
        self._facts: dict[str, Tensor] = {}
        self._key: Tensor | None = None
        self._width = 0
        self._input: Tensor | None = None
        self._past = 0

    def begin(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Starts a batch: forgets the facts of the one before and returns the new content key [B]."""
        self.end()
        self._key, self._width, self._input = content_key(input_ids, attention_mask), input_ids.shape[1], input_ids
        return self._key

    def end(self) -> None:
        """Forgets the batch and its facts: another may have been processed since by the same model."""
        self._facts, self.records, self._terms, self._held, self._recorded = {}, {}, {}, {}, set()
        self._key, self._width, self._input, self._past = None, 0, None, 0

    def goes_on(self, past: int) -> None:
        """Says how many tokens of every row the model has in its cache at the call that begins now."""
        if (past > 0) != (self._past > 0):
            self._held = {}  # what was made for the prefill's tokens
        self._past = past

    def put(self, name: str, fact: Tensor, key: Tensor) -> None:
        """Publishes a per-row fact.

        Args:
            name: what routers ask for, e.g. "task_id" or "prior".
            fact: [B, ...], row by row as in the batch.
            key: content key [B] of the rows that the fact was computed from.

        Raises:
            ValueError: the fact belongs to other rows than the current batch.
        """
        if self._key is None or key.shape != self._key.shape or not (key is self._key or torch.equal(key, self._key)):
            raise ValueError(f"routing fact {name!r} was computed for another batch: compute it from the batch in hand")
        self._facts[name], self._held = fact, {}

    def get(self, name: str, rows: int) -> Tensor | None:
        """Returns the fact for `rows` rows, or None if it was never put.

        Beam search repeats every row k times next to each other, so the facts are interleaved likewise.

        Raises:
            ValueError: `rows` is not a multiple of the batch's rows.
        """
        fact = self._facts.get(name)
        if fact is None or fact.shape[0] == rows:
            return fact
        if rows % fact.shape[0]:
            raise ValueError(
                f"routing fact {name!r} has {fact.shape[0]} rows, the layer sees {rows}: begin the batch anew"
            )
        return fact.repeat_interleave(rows // fact.shape[0], 0)

    def get_tokens(self, name: str, rows: int, tokens: int) -> Tensor | None:
        """Returns a per-token fact [rows, tokens, ...] for the tokens that the model sees in the running call.

        Args:
            name: of a fact [B, S + 1, ...]: one for each token of the batch, the last for every token after them.
            rows: see `get`.
            tokens: how many.
        """
        fact = self.get(name, rows)
        if fact is None:
            return None
        width = fact.shape[1] - 1
        own = fact[:, min(self._past, width) : min(self._past + tokens, width)]
        later = fact[:, -1:].expand(-1, tokens - own.shape[1], *fact.shape[2:])
        return torch.cat([own, later], 1) if later.shape[1] else own

    def check_input(self, input_ids: Tensor | None, attention_mask: Tensor | None, cached: bool) -> None:
        """Refuses a model call whose prompt is not the current batch (called before the model's forward).

        Args:
            input_ids: [B, S] what the model was called with; None (embeddings given) cannot be checked.
            attention_mask: [B, S] or None.
            cached: a decoding step that continues a prefill, which was checked itself.
        """
        if torch.compiler.is_compiling() or not self.enabled or not self._facts:
            return
        if input_ids is None or input_ids is self._input or cached or self._key is None:
            return
        width = self._width
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        found = content_key(input_ids[:, :width], mask[:, :width])
        repeats, rest = divmod(found.shape[0], self._key.shape[0])
        if rest or not torch.equal(found, self._key.repeat_interleave(repeats, 0)):
            raise ValueError(
                "the model was called with other rows than its routing facts: go through the module's forward"
            )

    def add_term(self, name: str, slot: str, value: Tensor | None) -> None:
        """Leaves a layer's part of a loss term, if any; by slot, because recomputation runs the layer twice."""
        if value is not None:
            self._terms.setdefault(name, {})[slot] = value

    def terms(self, name: str) -> dict[str, Tensor]:
        """Takes the parts that this batch's layers left of a loss term, by layer; they must not outlive the step."""
        return self._terms.pop(name, {})

    @property
    def begun(self) -> bool:
        """Whether there is a batch; a model may be called without any."""
        return self._key is not None

    def hold(self, slot: str, rows: int | torch.Size, make: Callable[[], T]) -> T:
        """Returns what `make` gives for a layer and so many rows: made once per batch where no gradient is needed.

        Weights that change within a batch are seen from the next one on.
        """
        if torch.is_grad_enabled():
            self._held.pop(slot, None)
            return make()
        held = self._held.get(slot)
        if held is None or held[0] != rows:
            held = self._held[slot] = rows, make()
        return held[1]

    def forget_held(self) -> None:
        """Lets everything be made anew: weights were loaded, moved or cast within a batch."""
        self._held = {}

    def observe(self, observer: Observer | None) -> None:
        """Has every layer's routing shown to somebody from now on, and kept no longer than that; None ends it."""
        self.recording, self._observer = observer is not None, observer

    @property
    def observed(self) -> bool:
        """Whether somebody is shown the routing."""
        return self._observer is not None

    def records_next(self, slot: str) -> bool:
        """Whether a layer's next routing will be recorded."""
        return self.recording and slot not in self._recorded

    def record(self, slot: str, routing: Routing) -> None:
        """Keeps, or shows, a layer's first routing of the batch: the prefill's, where generation goes on from it."""
        if not self.records_next(slot):
            return
        self._recorded.add(slot)
        if self._observer is None:
            self.records[slot] = routing
        else:
            self._observer(slot, routing)

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """Within: every adapted layer returns its base output."""
        before, self.enabled = self.enabled, False
        try:
            yield
        finally:
            self.enabled = before

    @contextlib.contextmanager
    def _restored(self, snapshot: tuple[dict[str, Tensor], bool]) -> Iterator[None]:
        now = self._facts, self.enabled, self.recording, self._terms
        self._facts, self.enabled = snapshot
        # The loss has its terms; recomputed ones would keep the activations of every recomputed layer alive.
        self.recording, self._terms = False, {}
        try:
            yield
        finally:
            self._facts, self.enabled, self.recording, self._terms = now

    def checkpoint_fns(self) -> tuple[contextlib.AbstractContextManager, contextlib.AbstractContextManager]:
        """`context_fn` of torch.utils.checkpoint: recomputation sees the facts as they were at its own forward."""
        return contextlib.nullcontext(), self._restored((self._facts, self.enabled))
