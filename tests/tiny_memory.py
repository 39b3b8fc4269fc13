"""Small models, not quite tiny, and what a real step on them keeps: counted tensor by tensor, on the CPU."""

import contextlib
from typing import Any, NamedTuple

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import checkpoint

from moe_peft.activations import Load
from moe_peft.backbones import Backbone, CausalLM, Seq2SeqLM
from tests.tiny import LLAMA, T5, TASKS, batch_of, build, fit_prior

SHAPES = {
    "causal": LLAMA | {"hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 4, "vocab_size": 509},
    "seq2seq": T5 | {"d_model": 128, "d_kv": 32, "d_ff": 256, "num_layers": 3, "vocab_size": 509},
}


class Real(NamedTuple):
    """Bytes that a real step kept; the names are those of a plan's parts."""

    weights: int
    adapters: int
    gradients: int
    optimizer: int
    activations: int


def backbone(kind: str, shape: dict[str, int] | None = None, **arguments: Any) -> Backbone:
    """A random backbone, of another shape in what is given."""
    made = {"causal": CausalLM, "seq2seq": Seq2SeqLM}[kind]
    return made(f"small-{kind}", shape=SHAPES[kind] | (shape or {}), random_weights=True, **arguments)


def on_meta(method: type, of: Backbone, **options: Any) -> Any:
    """A method without weights."""
    with torch.device("meta"):
        module = method(backbone=of, tasks=TASKS, **options)
        module.configure_model()
    return module


def ragged(kind: str, load: Load, seed: int = 5) -> Any:
    """A batch of random rows of which the first is as long as the load says, the others a little shorter."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(longest: int, row: int) -> list[int]:
        size = longest - (int(torch.randint(1, longest // 4 + 2, (), generator=generator)) if row else 0)
        return torch.randint(3, 500, (max(1, size),), generator=generator).tolist()

    answers = [tokens(load.answer_tokens, row) for row in range(load.rows)]
    longest = load.tokens - (load.answer_tokens if kind == "causal" else 0)
    prompts = [tokens(longest, row) for row in range(load.rows)]
    return batch_of(prompts, answers, kind, "left" if kind == "causal" else "right")


def real_step(
    method: type, of: Backbone, load: Load, autocast: torch.dtype | None = None, **options: Any
) -> tuple[Real, Any]:
    """Takes one step and counts; also returns the module."""
    module = build(method, backbone=of, scheduler=None, **options)
    if module.prior is not None:
        fit_prior(module)
    module.train()
    batch = ragged(of.kind, load)
    with Peak({parameter.untyped_storage()._cdata for parameter in module.parameters()}) as peak:
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            module.begin(batch)
            loss = sum(module.step_losses(batch).values())
        loss.backward()
    optimizer = module.configure_optimizers()
    optimizer.step()
    frozen = [parameter for parameter in module.parameters() if not parameter.requires_grad]
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    assert not any(parameter.grad is not None for parameter in frozen)
    return Real(
        weights=sum(tensor.nbytes for tensor in (*frozen, *module.buffers())),
        adapters=sum(parameter.nbytes for parameter in trained),
        gradients=sum(parameter.grad.nbytes for parameter in trained),
        optimizer=sum(value.nbytes for state in optimizer.state.values() for value in state.values()),
        activations=peak.bytes,
    ), module


class Peak(contextlib.ExitStack):
    """Within: counts what autograd saves, in a forward and in a block that is computed again, as long as it lives."""

    def __init__(self, own: set[int]) -> None:
        super().__init__()
        self.own, self.bytes = own, 0
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __enter__(self) -> "Peak":
        patch = self.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(checkpoint, "_recomputation_hook", lambda *args: self._heard(recomputing(*args)))
        self.enter_context(self._heard(saved_tensors_hooks(lambda tensor: tensor.detach(), lambda tensor: tensor)))
        return self

    def _heard(self, hooks: saved_tensors_hooks) -> saved_tensors_hooks:
        inner = hooks.pack_hook
        hooks.pack_hook = lambda tensor: (self._note(tensor), inner(tensor))[1]
        return hooks

    def _note(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self.own:
            return
        self.alive = {key: kept for key, kept in self.alive.items() if not kept[0].expired()}
        self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.bytes = max(self.bytes, sum(size for _, size in self.alive.values()))


recomputing = checkpoint._recomputation_hook
