"""Tiny TT-LoRA MoEs in fp64, every expert and its like alone as a plain TT-LoRA, and rows to answer."""

from typing import Any

import torch
from torch import Tensor

from moe_peft.batch import Batch
from moe_peft.data.collate import Collator
from moe_peft.data.encoding import EncodedRow
from moe_peft.data.tasks import TaskSpec
from moe_peft.methods.tt_lora import TTLoRA
from moe_peft.methods.tt_lora_moe import TTLoRAMoE
from tests.tiny import VOCABULARY, build, output, random_batch, randomise

KINDS = ["causal", "seq2seq", "classifier"]
CLASSES = (("bad", "good"), ("sport", "art", "law"), ("good", "neutral", "bad", "mixed"))
TASKS = [TaskSpec(f"task{i}", "classification", "accuracy", "{text}", names) for i, names in enumerate(CLASSES)]


def exact(module: Any) -> Any:
    """Brings a method to fp64, but for what the package itself computes in fp32."""
    module.double()
    for part in (module.heads, getattr(module, "router", None)):
        if part is not None:
            part.float()
    return module


def with_tasks(batch: Batch, *task_ids: int) -> Batch:
    """Gives the rows of a batch other tasks, and every row its task's share."""
    own = torch.tensor(task_ids)
    return batch | {"task_id": own, "task_share": torch.bincount(own)[own].float()}


def rows_for(kind: str = "causal", rows: int = 6, seed: int = 4) -> Batch:
    """A training batch whose rows cycle through the tasks.

    With this seed every task has an answer of several tokens: over one, a decoder's queries get no gradient.
    """
    batch = random_batch(rows, kind, seed)
    return with_tasks(batch, *(row % len(TASKS) for row in range(rows)))


def blank(kind: str = "causal", **options: Any) -> TTLoRAMoE:
    """A TT-LoRA MoE as it starts, in fp32."""
    return build(TTLoRAMoE, kind, **{"tasks": TASKS, "rank": 3, "alpha": 1.0} | options)


def experts_come_alive(module: Any, batch: Batch, seed: int = 1, scale: float = 0.3) -> Any:
    """Randomises all experts, heads and the router, and proves that each acts on its rows and learns from its own loss.

    Args:
        module: a TT-LoRA MoE in training mode.
        batch: rows of every task.
        seed: of the numbers.
        scale: of the numbers.
    """
    randomise(module, seed, scale)
    with torch.no_grad():
        adapted = output(module, batch)
        with module.context.disabled():
            bare = output(module, batch)
    assert ((adapted - bare).abs().flatten(1).amax(1) > 1e-3).all(), "an expert does not move the output of its rows"
    module.begin(batch)
    sum(module.step_losses(batch).values()).backward()
    for name, parameter in module.named_parameters():
        assert parameter.requires_grad == (parameter.grad is not None), name
        if parameter.grad is not None:
            own = parameter.grad.flatten(1) if parameter.dim() > 1 else parameter.grad[None]
            assert (own.abs().amax(1) > 0).all(), f"no gradient at a part of {name}"
    module.zero_grad(set_to_none=True)
    return module


def moe(
    kind: str = "causal", scale: float = 0.3, trained: bool = True, straight_through: bool = False, **options: Any
) -> TTLoRAMoE:
    """A TT-LoRA MoE in eval mode and fp64 whose every expert, head and score is random and proved to act."""
    module = experts_come_alive(exact(blank(kind, **options)), rows_for(kind), scale=scale)
    module.router_trained.fill_(trained)
    module.straight_through = straight_through
    return module.eval()


def alone(module: TTLoRAMoE, expert: int) -> TTLoRA:
    """One expert as a plain TT-LoRA of its own, with the head of its task."""
    kind = module.backbone.kind
    tasks = [module.specs[expert]]
    single = exact(build(TTLoRA, kind, tasks=tasks, rank=module.rank, alpha=module.alpha))
    for slot, layer in module.adapted.items():
        for core, own in zip(layer.factors.parameters(), single.adapted[slot].factors.parameters(), strict=True):
            own.data.copy_(core.data[expert])
    if module.heads is not None:
        rows = module.heads.owner == expert
        single.heads.to(module.heads.linear.weight.dtype)
        single.heads.linear.weight.data.copy_(module.heads.linear.weight.data[rows])
        single.heads.linear.bias.data.copy_(module.heads.linear.bias.data[rows])
    return single.eval()


def take(batch: Batch, *rows: int) -> Batch:
    """Some rows of a batch, as they are padded there."""
    at = list(rows)
    return {  # type: ignore[return-value]
        name: value[at] if isinstance(value, Tensor) else [value[i] for i in at] if isinstance(value, list) else value
        for name, value in batch.items()
    }


def send(module: TTLoRAMoE, *experts: int) -> None:
    """Makes the router choose these experts for the rows of the next batches."""
    module.scores = lambda batch: torch.nn.functional.one_hot(torch.tensor(experts), len(module.specs)).float()


def questions(kind: str, task: int, rows: int = 12, seed: int = 0) -> Batch:
    """An evaluation batch of one task: random prompts, random right answers."""
    generator = torch.Generator().manual_seed(100 * task + seed)

    def tokens(low: int, high: int) -> list[int]:
        size = int(torch.randint(low, high, (), generator=generator))
        return torch.randint(3, VOCABULARY, (size,), generator=generator).tolist()

    names, encoded = CLASSES[task], []
    for row in range(rows):
        label = int(torch.randint(len(names), (), generator=generator))
        plain = {"id": str(row), "choices": list(names), "label": label}
        options = [tokens(1, 4) for _ in names] if kind != "classifier" else []
        encoded.append(EncodedRow(f"task{task}/{row}", task, plain, str(row), tokens(4, 10), [], options, label, 0))
    return Collator(kind, pad_id=0).evaluate(encoded)
