"""A static LoRA in place of a routing that depends on the input: the mean of its cores over real rows.

A method such as T-REX gives every token a core C(x) of its own, so no LoRA equals it. What comes nearest at no cost is
B C̄ A, C̄ the mean of a linear's cores over the tokens of rows like those that will be served: a task's, or those of a
semantic cluster of the method's own prior. How far that is from the routed method is measured on rows held out, and
told. Shapes: N tokens, R ranks of A, Q ranks of B.
"""

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor

from moe_peft.batch import Batch
from moe_peft.context import RoutingContext
from moe_peft.data.collate import Collator
from moe_peft.data.encoding import EncodedRow
from moe_peft.data.tasks import Split
from moe_peft.interop.origin import Origin
from moe_peft.kernels.reference import Core, Gate, Tall
from moe_peft.layers.routers import Router
from moe_peft.methods.base import MultitaskModule
from moe_peft.methods.merging import task_number

logger = logging.getLogger(__name__)
By = Literal["task", "cluster"]
BATCH = 8
SPLITS: tuple[Split, ...] = ("train", "validation")
"""What is calibrated on, and what is held out."""


class Static(NamedTuple):
    """Cores that no longer depend on the input, and the rows that they were made from and are to be rated on."""

    name: str
    """The task's, or `cluster-<k>`."""
    task: int
    """Whose factors and head, where tasks have their own."""
    cores: dict[str, Tensor]
    """By linear: [Q, R], or [R] (diagonal)."""
    calibrated: list[EncodedRow]
    held_out: list[EncodedRow]


class FixedRouter(Router):
    """A router that always gives one core.

    Args:
        core: [Q, R], or [R] (diagonal).
    """

    core: Tensor

    def __init__(self, core: Tensor) -> None:
        super().__init__()
        self.register_buffer("core", core, persistent=False)

    def static_core(self, task: int) -> Tensor:
        """Returns the core."""
        return self.core

    def gate(self, x: Tensor, context: RoutingContext, slot: str) -> Gate:
        """Returns the core as weights of the pairs."""
        weights = self.core if self.core.dim() == 1 else self.core.mT.flatten()
        beta = weights.view(*(1,) * (x.dim() - 1), -1)
        return Gate("diagonal" if self.core.dim() == 1 else "matrix", beta=beta)


class Watched(Router):
    """A router whose cores are summed up; it has no gate, so that they are made.

    Args:
        router: what decides.
    """

    def __init__(self, router: Router) -> None:
        super().__init__()
        self.router = router
        self.mask: Tensor | None = None
        """[B, S] which tokens of the batch count."""
        self.total: Tensor | None = None
        self.tokens = 0.0

    def rows(self) -> Tensor | None:
        """Returns the router's own."""
        return self.router.rows()

    def forward(self, x: Tensor, h: Tensor, scores: Tensor | None, context: RoutingContext, slot: str) -> Core:
        """Returns the router's core, and adds those of real tokens up."""
        core = self.router(x, h, scores, context, slot)
        core = core.dense(h.shape[-1]) if isinstance(core, Tall) else core
        inner = core.shape[h.dim() - 1 :]  # [R] or [Q, R]
        cores = core.expand(*h.shape[:-1], *inner).reshape(-1, *inner)
        # Where the layer sees other tokens than the mask, the row is by itself and all are real.
        fits = self.mask is not None and self.mask.numel() == len(cores)
        real = self.mask.flatten().to(cores) if fits and self.mask is not None else cores.new_ones(len(cores))
        total = torch.tensordot(real, cores, 1).double().cpu()
        self.total = total if self.total is None else self.total + total
        self.tokens += real.sum().item()
        return core

    def mean(self) -> Tensor:
        """Returns the mean core: [Q, R], or [R] (diagonal)."""
        assert self.total is not None
        return (self.total / self.tokens).float()


def reads_input(module: MultitaskModule) -> bool:
    """Whether a method's cores depend on more than the task, so that no LoRA equals it."""
    module.built()
    for layer in module.adapted.values():
        try:
            layer.fixed_core(0)
        except ValueError:
            return True
    return False


@contextlib.contextmanager
def routed_by(module: MultitaskModule, routers: Mapping[str, Router]) -> Iterator[None]:
    """Within: other routers decide in these linears."""
    before = {slot: module.adapted[slot].router for slot in routers}
    try:
        for slot, router in routers.items():
            module.adapted[slot].router = router
        yield
    finally:
        for slot, router in before.items():
            module.adapted[slot].router = router
        module.context.forget_held()


@contextlib.contextmanager
def held(module: MultitaskModule, cores: dict[str, Tensor]) -> Iterator[None]:
    """Within: the module has these cores for every row, and is a plain LoRA; nothing asks its prior."""
    prior, module.prior = module.prior, None
    try:
        with routed_by(module, {slot: FixedRouter(core.to(module.device)) for slot, core in cores.items()}):
            yield
    finally:
        module.prior = prior


def calibrate(module: MultitaskModule, origin: Origin, by: By, tasks: Sequence[str], rows: int) -> list[Static]:
    """Makes static cores for tasks or clusters from the run's training rows.

    Args:
        module: trained, with cores that depend on the input.
        origin: its run.
        by: "task", or "cluster" of the method's own prior (the nearest centroid to a prompt), for rows of all tasks.
        tasks: which tasks; of no meaning for clusters.
        rows: training rows of a task to calibrate on, and validation rows to hold out.

    Raises:
        ValueError: no data, or clusters of a method that has none, or on a classifier, whose heads are its tasks'.
    """
    if by == "task":
        groups = {
            name: (task_number(module, name), origin.rows("train", name, rows), origin.rows("validation", name, rows))
            for name in tasks
        }
    else:
        training, validation = (_by_cluster(module, origin, origin.rows(split, None, rows)) for split in SPLITS)
        groups = {f"cluster-{k}": (0, own, validation.get(k, [])) for k, own in sorted(training.items())}
    found = []
    for name, (task, own, held_out) in groups.items():
        logger.info("taking the mean of the routing of %s over %d training rows", name, len(own))
        found.append(Static(name, task, mean_cores(module, origin, own), own, held_out))
    return found


def _by_cluster(module: MultitaskModule, origin: Origin, rows: list[EncodedRow]) -> dict[int, list[EncodedRow]]:
    """Returns rows by the cluster of their prompts."""
    prior = module.prior
    if prior is None or not prior.fitted:
        raise ValueError(
            f"approximate: this {type(module).__name__} has no clusters, which a fitted semantic prior has; use task"
        )
    if module.heads is not None:
        raise ValueError(
            "approximate: rows of a cluster belong to several tasks, each with a head of its own; use task"
        )
    assert origin.data is not None
    batches = (move_data_to_device(batch, module.device) for batch in origin.data.prompts(rows))
    clusters = torch.cat([prior.assign(prior.embedder(batch)) for batch in batches]).tolist()
    found: dict[int, list[EncodedRow]] = {}
    for row, cluster in zip(rows, clusters, strict=True):
        found.setdefault(cluster, []).append(row)
    return found


def answered(collator: Collator, rows: Sequence[EncodedRow], device: torch.device) -> Iterator[Batch]:
    """Yields batches of prompts with their right answers, of similar length."""
    ordered = sorted(rows, key=lambda row: len(row.prompt) + len(row.answer))
    # An encoder-decoder's layers see two masks, which only a row by itself does not need.
    step = 1 if collator.kind == "seq2seq" else BATCH
    for at in range(0, len(ordered), step):
        yield move_data_to_device(collator.train(ordered[at : at + step], 1.0, 1.0), device)


@torch.no_grad()
def mean_cores(module: MultitaskModule, origin: Origin, rows: Sequence[EncodedRow]) -> dict[str, Tensor]:
    """Returns the mean core of every routed linear over the tokens of rows, prompts and right answers."""
    assert origin.data is not None
    watched = {slot: Watched(layer.router) for slot, layer in module.adapted.items() if layer.router is not None}
    with routed_by(module, watched):
        for batch in answered(origin.data.collator, rows, module.device):
            for router in watched.values():
                router.mask = batch["attention_mask"]
            module(batch)
    return {slot: router.mean() for slot, router in watched.items()}
