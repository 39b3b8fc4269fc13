"""A LoRA out of Hugging Face PEFT's files as the start of a low-rank method.

The method begins as exactly that LoRA wherever it can be one: its factors are copied, scaled by what the method's core
is at the start, and its other ranks begin as they always do, with B at zero. For that a MoRE begins with all tasks at
the full rank, and an Intuition-MoR1E with routers that know nothing yet. TT-LoRA begins with what TT-SVD leaves of it.
Shapes: N nested experts, R ranks, T tasks, k ranks of the LoRA.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from moe_peft.interop.fit import refuse_unfit
from moe_peft.interop.heads import check_head, install_head
from moe_peft.interop.install import compress_into, notes_on, whole_error
from moe_peft.interop.lora_import import Lora
from moe_peft.layers.factors import DenseFactors
from moe_peft.layers.rank_selector import RankSelector
from moe_peft.layers.routers import JointRouter
from moe_peft.methods.base import MultitaskModule
from moe_peft.methods.lora import LoRA
from moe_peft.methods.merging import merged_layers
from moe_peft.methods.more import MoRE
from moe_peft.methods.trex import TRex
from moe_peft.methods.tt_lora import TTLoRA
from moe_peft.sharding import assign, edited, gathered, whole

LEAD = 0.1
"""How far the full rank's score starts above every other one: more than the scores of untrained gates lie apart."""


class Started(NamedTuple):
    """What became of a LoRA as a start."""

    lora: Lora
    errors: dict[str, float]
    """Relative error of the compressed update by linear; none where the method is exactly the LoRA."""
    notes: list[str]
    """What a user should know."""

    def __str__(self) -> str:
        """Returns one line."""
        how = "exactly"
        if self.errors:
            worst = max(self.errors, key=self.errors.__getitem__)
            whole = whole_error(self.lora, self.errors)
            how = f"compressed with relative error {whole:.2g} (at most {self.errors[worst]:.2g}, {worst})"
        return "; ".join([f"start: the LoRA of '{self.lora.folder}', {how}", *self.notes])


@torch.no_grad()
def start_from(module: MultitaskModule, lora: Lora) -> Started:
    """Makes an untrained method begin as a LoRA.

    Args:
        module: built.
        lora: what was read.

    Raises:
        ValueError: a LoRA that does not fit or has too many ranks, or a method that cannot be one; nothing is changed.
    """
    where = f"'{lora.folder}'"
    if merged_layers(module):
        raise ValueError(f"{where} cannot be taken into a merged model; call unmerge() first")
    if not isinstance(module, LoRA | MoRE | TRex | TTLoRA):
        raise ValueError(
            f"{where} cannot be the start of a {type(module).__name__}, only of LoRA, MoRE, TRex (mode rank1) and "
            "TTLoRA; a TTLoRAMoE takes LoRAs as experts (FreezeThenRoute's expert_paths)"
        )
    refuse_unfit(module, lora, where)
    if getattr(module, "alpha", 1) == 0:
        raise ValueError(f"{where} cannot be the start where alpha is 0; give another alpha")
    heads, notes = _heads(module, lora, where)
    errors = {}
    if isinstance(module, TTLoRA):
        errors = compress_into(module, lora)
    else:
        _copy_factors(module, lora, _starts(module, lora, where))
    if lora.head is not None:
        for task in heads:
            install_head(module, lora.head, task)
    return Started(lora, errors, [*notes_on(module, lora), *notes])


def _heads(module: MultitaskModule, lora: Lora, where: str) -> tuple[list[int], list[str]]:
    """Returns the tasks that a LoRA's head belongs to, by name and classes, and what to say where there are none."""
    head = lora.head
    if head is None or module.heads is None:
        return [], []
    same = lora.task, head.kind, head.choices
    tasks = [task for task, spec in enumerate(module.specs) if (spec.name, spec.kind, spec.choices) == same]
    for task in tasks:
        check_head(module, head, task, where)
    return tasks, [] if tasks else [f"its head is left out: no task {lora.task!r} with classes {[*head.choices]} here"]


def _starts(module: LoRA | MoRE | TRex, lora: Lora, where: str) -> dict[str, Tensor]:
    """Returns each linear's core [R] at the start, after seeing to it that it is the same for every row.

    Raises:
        ValueError: too many ranks, or cores that cannot be made so; nothing is changed.
    """
    if isinstance(module, TRex) and not module.rank1:
        raise ValueError(
            f"{where} cannot be the start of mix_and_match: while its routers know nothing, all its pairs together "
            "make a matrix of rank one; set mode: rank1, or start a LoRA, a MoRE or a TTLoRA"
        )
    for slot, update in lora.updates.items():
        rank, here = len(update.a), module.adapted[slot].factors.rank_in
        if rank > here:
            raise ValueError(
                f"{where} has rank {rank} at {slot}, {type(module).__name__} here {here}; give it rank {rank} or more"
                " (r1 and r2 of TRex), or compress it into a TTLoRA"
            )
    if isinstance(module, MoRE):
        return _full_ranks(module, where)
    if isinstance(module, TRex):
        return _uniform_gates(module, where)
    return {slot: torch.ones(layer.factors.rank_in) for slot, layer in module.adapted.items()}


def _full_ranks(module: MoRE, where: str) -> dict[str, Tensor]:
    """Lets every task begin with the largest expert of every linear."""
    selectors = module.selectors()
    if module.selector == "random" or (
        module.selector == "fixed" and (module.start != len(module.expert_ranks) - 1).any()
    ):
        raise ValueError(
            f"{where} cannot be the start of ranks that never move ({module.selector}); set selector: full, or fixed "
            "without fixed_rank"
        )
    for selector in selectors.values():
        _lead(selector, module)
    return {slot: selector.experts[-1] for slot, selector in selectors.items()}


def _lead(selector: RankSelector, module: MoRE) -> None:
    """Raises the bias of the largest expert until it leads for every task."""
    selector.start.fill_(len(selector.experts) - 1)
    if selector.weight is None or selector.bias is None or len(selector.experts) == 1:
        return
    table = selector.embedding or module.task_embedding
    assert table is not None
    scores = linear(*map(whole, (table.weight, selector.weight, selector.bias)))  # [T, N]
    behind = (scores[:, :-1].amax(1) - scores[:, -1]).amax()
    with edited(selector.bias) as bias:
        bias[-1] += behind.clamp(min=-LEAD) + LEAD


def _uniform_gates(module: TRex, where: str) -> dict[str, Tensor]:
    """Lets every router begin without a preference, and without the prior's part."""
    if module.top_k is not None:
        raise ValueError(f"{where} cannot be the start where top_k drops experts; leave top_k out")
    if module.clusters == module.r1:
        raise ValueError(
            f"{where} cannot be the start where a prior weighs the experts of every prompt; set use_prior: false, or "
            f"another number of clusters than r1, {module.r1}: their projection then begins at zero"
        )
    cores = {}
    for slot, layer in module.adapted.items():
        router = layer.router
        assert isinstance(router, JointRouter)
        for own in (router.weight, router.projection):
            if own is not None:
                assign(own, torch.zeros(own.shape))
        with gathered(router):
            omega, magnitude = router.gates()
        weight = router.token_coef * omega / router.experts + router.diagonal
        cores[slot] = (magnitude * weight).expand(router.experts)
    return cores


def _copy_factors(module: MultitaskModule, lora: Lora, cores: dict[str, Tensor]) -> None:
    """Copies a LoRA's factors into the first ranks; B takes up the quotient of what scales them there and here."""
    for slot, (a, b, scale) in lora.updates.items():
        layer, rank = module.adapted[slot], len(a)
        factors = layer.factors
        assert isinstance(factors, DenseFactors)
        quotient = scale / (layer.scale * cores[slot][:rank].to(b.device))
        with edited(factors.A) as value:
            value[:rank] = a
        with edited(factors.B) as value:
            value[:, :rank] = b * quotient
