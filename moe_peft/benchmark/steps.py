"""One training step of a whole model: forward, backward, clipping, optimizer; of every method and of HF PEFT."""

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from moe_peft.backbones import Backbone
from moe_peft.batch import Batch
from moe_peft.benchmark.models import (
    METHODS,
    OWN,
    PEFT,
    RANK,
    XLORA,
    build,
    factors_of,
    random_batch,
    randomise,
    sharing,
)
from moe_peft.benchmark.rivals import HAS_PEFT
from moe_peft.benchmark.timing import Variant, clock_of, interleave, summary
from moe_peft.methods.base import MultitaskModule
from moe_peft.methods.expert_clipping import clip_per_expert
from moe_peft.methods.tt_lora_moe import TTLoRAMoE
from moe_peft.optim import parameter_groups, trained_parameters

RATE, CLIP, EXPERTS = 1e-4, 1.0, 4
FROZEN = "frozen model"
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 3e-2}
"""Largest accepted difference between the losses of our LoRA and of PEFT's with the same factors."""


class Contestant(NamedTuple):
    """One way to train."""

    name: str
    loss: Callable[[], Tensor]
    trained: Mapping[str, Tensor]
    clip: Callable[[], Any]

    def step(self, optimizer: torch.optim.Optimizer | None) -> float:
        """Makes one step and returns its loss before it."""
        loss = self.loss()
        loss.backward()
        if optimizer is not None:
            self.clip()
            optimizer.step()
            optimizer.zero_grad()
        return loss.item()


def step_section(backbone: Backbone, rows: int, tokens: int, rounds: int, device: str) -> list[dict[str, Any]]:
    """Times one step of everything.

    Args:
        backbone: the frozen model.
        rows: B.
        tokens: S.
        rounds: steps of each.
        device: where.

    Raises:
        RuntimeError: adapters that do nothing, or losses that differ where they must not.
    """
    model = backbone.load().to(device)
    batch = random_batch(backbone.config().vocab_size, rows, tokens, device)
    with contestants(sharing(backbone, model), batch) as everyone:
        check(everyone, backbone.dtype)
        variants = []
        for one in everyone:
            optimizer = torch.optim.AdamW(one.trained.values(), lr=RATE) if one.trained else None
            variants.append(Variant(one.name, partial(one.step, optimizer)))
        times = summary(interleave(variants, rounds, clock_of(device), warm_up=1))
    setting = {"job": "training step", "rows": rows, "tokens": tokens, "dtype": str(backbone.dtype).split(".")[-1]}
    return [
        {**setting, "variant": one.name, "parameters": sum(map(Tensor.numel, one.trained.values())), **times[one.name]}
        for one in everyone
    ]


def check(everyone: list[Contestant], dtype: torch.dtype) -> None:
    """Refuses adapters that do nothing.

    Raises:
        RuntimeError: a gradient that is missing or zero, or our LoRA and PEFT's that differ.
    """
    losses = {}
    for one in everyone:
        loss = one.loss()
        loss.backward()
        losses[one.name] = loss.item()
        for name, weight in one.trained.items():
            if weight.grad is None or not weight.grad.abs().max() > 0:
                raise RuntimeError(f"{one.name}: {name} has no gradient")
            weight.grad = None
    for name, loss in losses.items():
        if name != FROZEN and abs(loss - losses[FROZEN]) < 1e-4:
            raise RuntimeError(f"{name}: the adapters do not move the loss, {loss}")
    if PEFT in losses and not abs(losses[PEFT] - losses[OWN]) < TOLERANCE[dtype]:
        raise RuntimeError(f"the losses of the same LoRA differ: {losses[OWN]} ours, {losses[PEFT]} of PEFT")


@contextmanager
def contestants(backbone: Backbone, batch: Batch) -> Iterator[list[Contestant]]:
    """Sets everything up, on the weights of one model; within, PEFT finds its files."""
    modules = {name: build(backbone, name).train() for name in METHODS}
    everyone = [frozen(backbone.load(), batch), *(own(name, module, batch) for name, module in modules.items())]
    with tempfile.TemporaryDirectory() as folder:
        if HAS_PEFT:
            everyone += [peft(backbone.load(), batch, modules[OWN]), xlora(backbone, batch, Path(folder))]
        yield everyone


def own(name: str, module: MultitaskModule, batch: Batch) -> Contestant:
    """One of our methods, in the step that its `training_step` makes; a mixture of experts trains its experts."""

    def loss() -> Tensor:
        module.begin(batch)
        return sum(module.step_losses(batch).values(), start=torch.zeros((), device=batch["input_ids"].device))

    closed = {id(weight) for group in module.closed_groups for weight in parameter_groups(module)[group]}
    trained = {name: weight for name, weight in trained_parameters(module).items() if id(weight) not in closed}
    if isinstance(module, TTLoRAMoE):
        return Contestant(name, loss, trained, partial(clip_per_expert, module, CLIP))
    return Contestant(name, loss, trained, partial(clip_grad_norm_, list(trained.values()), CLIP))


def frozen(model: nn.Module, batch: Batch) -> Contestant:
    """Forward and backward down to the embeddings, nothing to train: the floor of every method."""
    model.enable_input_require_grads()  # type: ignore[operator]
    return Contestant(FROZEN, partial(plain_loss, model, batch), {}, lambda: None)


def plain_loss(model: Any, batch: Batch) -> Tensor:
    """Returns the model's own loss of the answer tokens."""
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": batch["labels"]}
    return model(**inputs, use_cache=False).loss


def peft(model: nn.Module, batch: Batch, ours: MultitaskModule) -> Contestant:
    """PEFT's LoRA as users run it, with our LoRA's factors."""
    from moe_peft.comparison.peft_script import AS_USED, PeftScript

    script = PeftScript(model, AS_USED, RANK, cycle([batch]), RATE, CLIP)
    script.start_as(factors_of(ours))
    return with_torch(PEFT, script.model, partial(script.loss, batch))


def xlora(backbone: Backbone, batch: Batch, folder: Path) -> Contestant:
    """PEFT's X-LoRA over some LoRAs of all linears, which train with its classifier."""
    from peft import LoraConfig, XLoraConfig, get_peft_model

    width, paths = backbone.hidden_size, {}
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    for expert in range(EXPERTS):
        lora: Any = get_peft_model(backbone.load(), config)  # type: ignore[arg-type]
        lora.save_pretrained(str(folder / str(expert)))
        paths[str(expert)] = str(folder / str(expert))
    model: Any = backbone.load()
    model.config.use_cache = False
    mixture = XLoraConfig(
        task_type="CAUSAL_LM", hidden_size=width, adapters=paths, xlora_depth=2, use_trainable_adapters=True
    )
    model = get_peft_model(model, mixture).to(batch["input_ids"].device)
    randomise(model)
    return with_torch(XLORA, model, partial(plain_loss, model, batch))


def with_torch(name: str, model: nn.Module, loss: Callable[[], Tensor]) -> Contestant:
    """Returns a model whose step is torch's own."""
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    return Contestant(name, loss, trained, partial(clip_grad_norm_, list(trained.values()), CLIP))
