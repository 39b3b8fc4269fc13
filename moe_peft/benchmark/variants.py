"""Our methods on one linear, built as their modules build them, each with its plain formula in fp64.

    y = s · B C(x) A x

The plain formula is written as the papers write it, and shares no code with the layers' forward. Shapes: B rows,
S tokens, D in, O out, R rows of A, Q columns of B, E experts (or pairs).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import cycle
from typing import NamedTuple

import torch
from torch import Tensor, nn

from moe_peft.benchmark.figures import Product
from moe_peft.benchmark.setting import Setting, draw
from moe_peft.context import RoutingContext
from moe_peft.layers.adapted import AdaptedLinear
from moe_peft.layers.expert_cache import ExpertCache
from moe_peft.layers.experts import ExpertLinear
from moe_peft.layers.factors import DenseFactors, TensorTrainFactors
from moe_peft.layers.nested_experts import nested_experts
from moe_peft.layers.rank_selector import RankSelector
from moe_peft.layers.routers import JointRouter
from moe_peft.layers.tensor_train import Layout, layout_of, reconstruct


class Subject(NamedTuple):
    """One adapted linear."""

    name: str
    base: nn.Linear
    forward: Callable[[Tensor], Tensor]
    """x -> base(x) + update; every call is a new batch, of other tasks where there are tasks."""
    plain: Callable[[Tensor], Tensor]
    """x in fp64 -> the update of the last batch by the plain formula, differentiable in the trained tensors."""
    trained: Mapping[str, Tensor]
    """What a step changes; empty where the adapter is frozen, or merged."""
    products: list[Product]
    """The closed formula of its FLOPs, the base's own product left out."""
    experts: int = 1
    stored: Sequence[Tensor] = ()
    """What else stays in memory from step to step."""


class Turns:
    """The tasks of the rows: every row another, as far as there are, and every batch the next ones."""

    def __init__(self, setting: Setting, count: int) -> None:
        period = math.lcm(setting.rows, count) // setting.rows
        every = torch.arange(period * setting.rows, device=setting.device).view(period, setting.rows) % count
        self.batches = every.unbind()
        self._turn = cycle(range(period))
        self.at = 0

    def next(self) -> int:
        """Goes on to the next batch and returns its number."""
        self.at = next(self._turn)
        return self.at

    @property
    def current(self) -> Tensor:
        """The tasks of the present batch [B]."""
        return self.batches[self.at]


def low_rank(setting: Setting, rank_in: int, rank_out: int, frozen: bool = False, extra: int = 0) -> list[Product]:
    """Returns the two products that every method has, of all tokens; `extra` rows are stacked below A."""
    count, width, gradients = setting.count, setting.width, 1 if frozen else 2
    name = "[A; W_r] x" if extra else "A x"
    return [
        Product(name, count, width, rank_in + extra, gradients),
        Product("B o", count, rank_out, width, gradients),
    ]


def update(x: Tensor, a: Tensor, b: Tensor, core: Tensor | None = None, scale: float = 1.0) -> Tensor:
    """The plain formula in fp64: core None, a diagonal [B or 1, S or 1, R], or pairs [B, S, R, Q]."""
    h = torch.einsum("bsd,rd->bsr", x, a.double())
    if core is not None:
        h = h * core.double() if core.dim() == 3 else torch.einsum("bsr,bsrq->bsq", h, core.double())
    return scale * torch.einsum("bsq,oq->bso", h, b.double())


def dense(setting: Setting, rank_in: int, rank_out: int, generator: torch.Generator) -> DenseFactors:
    """Returns random factors that keep the size of their inputs."""
    factors = DenseFactors(setting.width, setting.width, rank_in, rank_out, setting.device)
    draw(factors.A, setting.width**-0.5, generator)
    draw(factors.B, rank_out**-0.5, generator)
    return factors


def trained(layer: nn.Module) -> dict[str, Tensor]:
    """Returns what a layer trains, by name."""
    return {name: parameter for name, parameter in layer.named_parameters() if parameter.requires_grad}


def batch_by_batch(setting: Setting, layer: AdaptedLinear, context: RoutingContext) -> Callable[[Tensor], Tensor]:
    """Returns the layer's forward, every call of which is another batch: nothing that a batch keeps outlives it."""
    key, ids = setting.begin(context), torch.zeros(setting.rows, dtype=torch.int64, device=setting.device)

    def forward(x: Tensor) -> Tensor:
        context.put("task_id", ids, key)
        return layer(x)

    return forward


def lora(setting: Setting, rank: int, name: str) -> Subject:
    """LoRA through this package."""
    factors, base = dense(setting, rank, rank, torch.Generator().manual_seed(2)), setting.linear()
    context = RoutingContext()
    layer = AdaptedLinear(base, factors, None, 2.0, 0.0, context, name).train(setting.training)

    def plain(x: Tensor) -> Tensor:
        return update(x, factors.A, factors.B, scale=2.0)

    forward = batch_by_batch(setting, layer, context)
    return Subject(name, base, forward, plain, trained(layer), low_rank(setting, rank, rank))


def trex(setting: Setting, r1: int, r2: int, rank1: bool, name: str) -> Subject:
    """T-REX with r1 · r2 pairs, or MoR1E; the semantic prior of every row is there, as the module computes it."""
    generator, base, context = torch.Generator().manual_seed(3), setting.linear(), RoutingContext()
    pairs = r1 if rank1 else r1 * r2
    router = JointRouter(setting.width, r1, r2, rank1=rank1, clusters=pairs, device=setting.device)
    draw(router.weight, setting.width**-0.5, generator)
    for gate in (router.omega, router.magnitude):
        draw(gate, 0.004, generator)
    factors = dense(setting, r1, r2, generator)
    layer = AdaptedLinear(base, factors, router, 1.0, 0.0, context, name).train(setting.training)
    prior = torch.randn(setting.rows, pairs, generator=generator).to(setting.device)
    key = setting.begin(context)

    def forward(x: Tensor) -> Tensor:
        context.put("prior", prior, key)
        return layer(x)

    def plain(x: Tensor) -> Tensor:
        omega, magnitude = (torch.sigmoid(100 * gate.double()) for gate in (router.omega, router.magnitude))
        p = torch.einsum("bsd,ed->bse", x, router.weight.double()).softmax(-1)
        g = magnitude * (32 * omega * p + 4 * (1 - omega) * prior.double().unsqueeze(1))
        return update(x, factors.A, factors.B, g if rank1 else g.unflatten(-1, (r1, r2)))

    products = low_rank(setting, r1, r2, extra=pairs)  # the core acts by elementwise products and sums
    return Subject(name, base, forward, plain, trained(layer), products, pairs, [prior])


def more(setting: Setting, rank: int, tasks: int, name: str, merge: bool = False) -> Subject:
    """MoRE with an expert per rank and task embeddings of its own; merged, its first task's."""
    generator, base, context = torch.Generator().manual_seed(4), setting.linear(), RoutingContext()
    nested = nested_experts(range(1, rank + 1), rank, tasks, "rank_over_r").to(setting.device)
    selector = RankSelector(setting.width, nested, tasks, device=setting.device)
    assert selector.embedding is not None and selector.weight is not None and selector.bias is not None
    table, weight, bias = selector.embedding.weight, selector.weight, selector.bias
    for parameter, std in ((table, 1.0), (weight, setting.width**-0.5), (bias, 0.1)):
        draw(parameter, std, generator)
    factors, turns = dense(setting, rank, rank, generator), Turns(setting, tasks)
    layer = AdaptedLinear(base, factors, selector, 2.0, 0.0, context, name).train(setting.training)
    key = setting.begin(context)
    if merge:
        layer.merge(layer.fixed_core(0))

    def forward(x: Tensor) -> Tensor:
        context.put("task_id", turns.batches[turns.next()], key)
        return layer(x)

    def plain(x: Tensor) -> Tensor:
        p = (table.double() @ weight.double().mT + bias.double()).softmax(-1)
        hard = nn.functional.one_hot(p.argmax(-1), rank).double()
        cores = (hard + p - p.detach()) @ nested.double()
        core = cores[turns.current].unsqueeze(1)
        return update(x, factors.A, factors.B, cores[:1].unsqueeze(1) if merge else core, 2.0)

    if merge:
        return Subject(name, base, forward, plain, {}, [], rank)
    products = low_rank(setting, rank, rank)
    products += [Product("W e", tasks, setting.width, rank, 2), Product("p M", tasks, rank, rank, 1)]
    if not setting.training:  # an unknown task's core is made in evaluation
        products.append(Product("W mean e", 1, setting.width, rank, 0))
    return Subject(name, base, forward, plain, trained(layer), products, rank, [nested])


def tensor_train(setting: Setting, rank: int, experts: int | None, generator: torch.Generator) -> TensorTrainFactors:
    """Returns random tensor-train factors that keep the size of their inputs."""
    layout = layout_of(setting.width, setting.width)
    factors = TensorTrainFactors(layout, rank, experts=experts, device=setting.device)
    for core in factors.cores:
        draw(core, core.shape[-3] ** -0.5, generator)
    return factors


def fold_products(layout: Layout, rank: int, count: int, gradients: int) -> list[Product]:
    """Returns the products that merge the cores of `count` trains into A and B."""
    shapes, split = layout.shapes(rank), len(layout.inputs)
    products, size = [], layout.inputs[0]
    for before, mode, after in shapes[1:split]:
        products.append(Product("fold A", count * mode * size, before, after, gradients))
        size *= mode
    size = layout.outputs[-1]
    for before, mode, after in reversed(shapes[split:-1]):
        products.append(Product("fold B", count * size * mode, after, before, gradients))
        size *= mode
    return products


def tt_lora(setting: Setting, rank: int, name: str, merge: bool = False) -> Subject:
    """TT-LoRA that learns, or merged."""
    base, context = setting.linear(), RoutingContext()
    factors = tensor_train(setting, rank, None, torch.Generator().manual_seed(5))
    layer = AdaptedLinear(base, factors, None, 1.0, 0.0, context, name).train(setting.training)
    if merge:
        layer.merge()
    forward = batch_by_batch(setting, layer, context)

    def plain(x: Tensor) -> Tensor:
        return x @ reconstruct([core.double() for core in factors.cores], factors.layout).mT

    if merge:
        return Subject(name, base, forward, plain, {}, [])
    products = low_rank(setting, rank, rank) + fold_products(factors.layout, rank, 1, 2)
    return Subject(name, base, forward, plain, trained(layer), products)


def tt_experts(setting: Setting, rank: int, experts: int, name: str) -> Subject:
    """TT-LoRA MoE with frozen experts, which the module's table of folded experts serves where it can."""
    base, context, turns = setting.linear(), RoutingContext(), Turns(setting, experts)
    factors = tensor_train(setting, rank, experts, torch.Generator().manual_seed(6)).requires_grad_(False)
    layer = ExpertLinear(base, factors, 1.0, 0.0, context, name).train(setting.training)
    key = setting.begin(context)
    with torch.set_grad_enabled(setting.training):
        lines = ExpertCache([layer], limit=2**62).lines(torch.arange(experts, device=setting.device))
    fact, facts = ("task_id", turns.batches) if lines is None else ("line", [lines[ids] for ids in turns.batches])

    def forward(x: Tensor) -> Tensor:
        context.put(fact, facts[turns.next()], key)
        return layer(x)

    def plain(x: Tensor) -> Tensor:
        chosen = turns.current
        own = ([core[expert].double() for core in factors.cores] for expert in chosen)
        return torch.stack([row @ reconstruct(cores, factors.layout).mT for row, cores in zip(x, own, strict=True)])

    products = low_rank(setting, rank, rank, frozen=True)
    if lines is None:
        products += fold_products(factors.layout, rank, setting.rows, 0)
    return Subject(name, base, forward, plain, {}, products, experts, [*factors.cores, *(layer.table or ())])
