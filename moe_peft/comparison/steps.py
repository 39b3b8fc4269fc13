"""Whole training steps, this package's and a plain PEFT script's, in turns on the same batches.

A step is all that happens from one to the next: the batch's rows are padded, forward, backward, clipping, AdamW, and in
a fit its callbacks and loggers. Base and rows are loaded and tokenised before.
"""

import random
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import count
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback
from rich import box
from rich.table import Table

from moe_peft.backbones import Backbone
from moe_peft.batch import Batch
from moe_peft.callbacks.freeze_then_route import FreezeThenRoute
from moe_peft.callbacks.semantic_prior import SemanticPriorFit
from moe_peft.callbacks.task_contrast import TaskContrast
from moe_peft.comparison.peft_script import AS_USED, FORMS, Form, PeftScript
from moe_peft.comparison.stepwise import Contestant, play_fit, play_script
from moe_peft.data.module import MultitaskDataModule
from moe_peft.methods.base import MultitaskModule
from moe_peft.methods.lora import LoRA
from moe_peft.methods.more import MoRE
from moe_peft.methods.trex import TRex
from moe_peft.methods.tt_lora_moe import TTLoRAMoE
from moe_peft.optim import trained_parameters

RANK = 8
CLIP = 1.0
RATE = 3e-4
WARM_UP = 2
NOISE = 0.01
"""Every start value is moved by a normal number of this size, so that no adapter is zero."""
TOLERANCE = 1e-3
"""Largest accepted difference of two losses on a float32 base."""
ALIVE = 1e-2
"""The adapters must move the first batch's loss by more than this, or equal losses would say nothing."""


class Method(NamedTuple):
    """One of ours, as its configuration file sets it up."""

    build: Callable[..., MultitaskModule]
    arguments: dict[str, Any]
    callbacks: Callable[[int], list[Callback]] = lambda steps: []


METHODS = {
    "LoRA r=8": Method(LoRA, {"rank": RANK, "alpha": 2.0 * RANK, "loss_mean": "token"}),
    "T-REX 4x4": Method(TRex, {"r1": 4, "r2": 4}, lambda steps: [SemanticPriorFit(max_texts=200)]),
    "T-REX 4x8": Method(TRex, {"r1": 4, "r2": 8}, lambda steps: [SemanticPriorFit(max_texts=200)]),
    "MoRE r=8": Method(MoRE, {"rank": RANK}, lambda steps: [TaskContrast()]),
    "TT-LoRA MoE": Method(TTLoRAMoE, {}, lambda steps: [FreezeThenRoute(experts_steps=steps)]),
}
"""By name; TT-LoRA MoE in its first stage, where the experts learn. LoRA's loss is the mean over answer tokens, as the
script's is."""
LORA = "LoRA r=8"


class Record(NamedTuple):
    """What a contestant's steps were: one number each."""

    losses: list[float]
    cpu: list[float]
    """CPU seconds of its process."""
    wall: list[float]


def compare_losses(
    data: MultitaskDataModule, base: Backbone, script_base: Backbone, steps: int, threads: int
) -> dict[str, list[float]]:
    """Returns the losses of our LoRA and of both forms of the PEFT script from the same start on.

    Args:
        data: the rows.
        base: ours, in float32.
        script_base: the script's, likewise.
        steps: optimizer steps.
        threads: of torch.

    Raises:
        RuntimeError: two losses of one step differ, or adapters that do not move the loss.
    """
    forms = [form for form in FORMS if form.adapters == "fp32"]
    with contestants(data, base, script_base, [LORA], forms, steps, threads) as all_of_them:
        first = next(batches_of(data))
        plain = PeftScript(script_base.load(), AS_USED, RANK, iter([]), RATE, CLIP)
        with torch.no_grad(), plain.model.disable_adapter():
            bare = plain.loss(first).item()
        losses = {name: record.losses for name, record in take_turns(all_of_them, steps).items()}
    if abs(losses[LORA][0] - bare) < ALIVE:
        raise RuntimeError(f"the adapters do not move the loss: {losses[LORA][0]} with them, {bare} without")
    for name, own in losses.items():
        worst = max(abs(one - two) for one, two in zip(own, losses[LORA], strict=True))
        if not worst <= TOLERANCE:
            raise RuntimeError(f"losses of {name} and {LORA} differ by {worst:.1e}, more than {TOLERANCE}")
    return losses


def compare_times(
    data: MultitaskDataModule,
    base: Backbone,
    script_base: Backbone,
    names: Sequence[str],
    rounds: int,
    threads: int,
) -> dict[str, Record]:
    """Returns what the steps of our methods and of all forms of the PEFT script took, by name.

    Args:
        data: the rows.
        base: ours.
        script_base: the script's.
        names: which of `METHODS`.
        rounds: steps of each, after two of warm-up.
        threads: of torch.
    """
    with contestants(data, base, script_base, names, FORMS, rounds + WARM_UP, threads) as all_of_them:
        take_turns(all_of_them, WARM_UP)
        return take_turns(all_of_them, rounds)


def take_turns(all_of_them: Sequence[Contestant], rounds: int) -> dict[str, Record]:
    """Lets everyone make a step per round, in an order of its own in every round."""
    order = random.Random(0)
    records = {each.name: Record([], [], []) for each in all_of_them}
    for _ in range(rounds):
        for each in order.sample(list(all_of_them), len(all_of_them)):
            for values, value in zip(records[each.name], each.step(), strict=True):
                values.append(value)
    return records


@contextmanager
def contestants(
    data: MultitaskDataModule,
    base: Backbone,
    script_base: Backbone,
    names: Sequence[str],
    forms: Sequence[Form],
    steps: int,
    threads: int,
) -> Iterator[list[Contestant]]:
    """Sets up our methods and the PEFT script, which starts with our LoRA's A and B.

    Args:
        data: the rows; its backbone decides the tokens only.
        base: ours.
        script_base: the script's.
        names: which of `METHODS`.
        forms: of the PEFT script.
        steps: at most so many steps of each.
        threads: of torch.
    """
    torch.set_num_threads(threads)
    data.setup("fit")
    plain = script_base.load()
    with ExitStack() as stack:
        modules = {name: build(METHODS[name], data, base) for name in dict.fromkeys([LORA, *names])}
        factors = {slot: layer.fixed_factors(0) for slot, layer in modules[LORA].adapted.items()}
        scripts = [PeftScript(plain, form, RANK, batches_of(data), RATE, CLIP) for form in forms]
        for script in scripts:
            script.start_as(factors)
        plays = {}
        for name, module in modules.items():
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            plays[name] = play_fit(module, data, METHODS[name].callbacks(steps), steps, CLIP, threads, folder)
        plays |= {script.name: play_script(script) for script in scripts}
        found = []
        for name, play in plays.items():
            found.append(Contestant(name, play))
            stack.callback(found[-1].end)
        yield found


def build(method: Method, data: MultitaskDataModule, backbone: Backbone, seed: int = 0) -> MultitaskModule:
    """Builds a method of which no start value is zero."""
    optimizer = partial(torch.optim.AdamW, lr=RATE, weight_decay=0.0)
    common = {"backbone": backbone, "tasks": data.specs, "optimizer": optimizer, "scheduler": None}
    torch.manual_seed(seed)
    module = method.build(**common, **method.arguments)
    module.configure_model()
    for parameter in trained_parameters(module).values():
        parameter.data.add_(NOISE * torch.randn_like(parameter))
    return module


def batches_of(data: MultitaskDataModule) -> Iterator[Batch]:
    """Yields what a fit trains on, epoch after epoch."""
    loader = data.train_dataloader()
    for epoch in count():
        loader.multitask_sampler.set_epoch(epoch)
        yield from loader


def ratios(records: dict[str, Record]) -> dict[str, dict[str, float]]:
    """Returns everyone's CPU time over everyone else's: the median, over rounds, of the ratio within a round."""
    return time_ratios({name: record.cpu for name, record in records.items()})


def time_ratios(times: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Returns the medians of the ratios of times that were taken side by side."""
    return {
        name: {
            other: statistics.median(one / two for one, two in zip(own, theirs, strict=True))
            for other, theirs in times.items()
        }
        for name, own in times.items()
    }


def table(records: dict[str, Record], title: str) -> Table:
    """Lays out the times, with the ratios to every form of the PEFT script."""
    references = [str(form) for form in FORMS]
    found = ratios(records)
    result = Table("a step", title=title, title_justify="left", box=box.SIMPLE)
    for name in ("CPU s", "wall s", *(f"/ {name}".replace(", ", ",\n") for name in references)):
        result.add_column(name, justify="right", no_wrap=True)
    for name, record in records.items():
        seconds = [f"{statistics.median(times):.3f}" for times in (record.cpu, record.wall)]
        result.add_row(name, *seconds, *(f"{found[name][other]:.2f}" for other in references))
    return result
