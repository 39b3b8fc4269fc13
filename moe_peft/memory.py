"""Plans the bytes that a run needs on every GPU, without weights and without a GPU.

Parameters, gradients, optimizer states and saved activations are counted on the meta device from the run's own
configuration. On top come the CUDA context, what lives within one operation, and the allocator's gaps: leave a tenth.

- DDP: all is whole on every rank; it reduces gradients in buckets, a second copy of them.
- FSDP2 (`moe_peft.sharding`): every parameter is cut along its first dimension, its gradient and optimizer states like
  it, so a rank holds ceil(rows / ranks) of its rows. What lies outside the blocks (embeddings, norm, output head, the
  method's own modules) is whole during a step, and up to two blocks are: one at work and the next one on its way.
  A block's gradients are whole while they are reduced, and once more in the buffer that they are reduced from.

What is said of a rank is said of the first one, which no other exceeds.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from jsonargparse import Namespace
from lightning.pytorch import Trainer
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from moe_peft import cli
from moe_peft.activations import Load, activation_bytes
from moe_peft.callbacks.checkpoints import AdapterCheckpoint
from moe_peft.counting import SECTIONS, build_on_meta, model_parser
from moe_peft.data import module as data_module
from moe_peft.methods.base import MultitaskModule
from moe_peft.parsing import ConfigParser

# Imported so that their classes are known to the configuration by bare name.
NAMED = (*cli.NAMED, *data_module.NAMED)
MIXED = {"bf16": torch.bfloat16, "16": torch.float16}
"""Dtypes of the trainer's mixed precisions."""
PARTS = ("weights", "adapters", "gradients", "optimizer", "activations", "communication")


class Plan(NamedTuple):
    """Bytes on one GPU at the peak of a step."""

    weights: int
    """Frozen parameters, and all buffers."""
    adapters: int
    """Trainable parameters."""
    gradients: int
    optimizer: int
    activations: int
    communication: int
    """DDP's buckets; FSDP2's whole blocks, and what lies outside them."""

    @property
    def total(self) -> int:
        """The sum of the parts."""
        return sum(self)


def run_parser() -> ConfigParser:
    """Returns a parser of a run's model, data, trainer and checkpoint sections, with the defaults of `fit`.

    It needs none that it can run with.
    """
    parsed = ("data", "trainer", "checkpoint")
    parser = model_parser(ignored=[section for section in SECTIONS if section not in parsed])
    parser.add_subclass_arguments(data_module.MultitaskDataModule, "data", skip={"backbone"}, required=False)
    parser.add_class_arguments(Trainer, "trainer")
    parser.add_class_arguments(AdapterCheckpoint, "checkpoint")
    parser.set_defaults({f"trainer.{name}": value for name, value in cli.TRAINER_DEFAULTS.items()})
    return parser


def plan_memory(
    config: Namespace,
    gpus: int,
    tasks: int | None = None,
    rows: int | None = None,
    tokens: int | None = None,
    answer_tokens: int | None = None,
) -> dict[str, Any]:
    """Plans a run on so many GPUs.

    Args:
        config: parsed by `run_parser`.
        gpus: how many, on all nodes together.
        tasks: how many; those of the data section where not given.
        rows: of one GPU's micro-batch; by default what the data section's batch size leaves it.
        tokens: of the longest row; by default the data section's `max_length`.
        answer_tokens: of every answer; by default the method's `max_new_tokens`.

    Returns:
        The sizes that it is for, and under "plans" by strategy the bytes of every part and their total.

    Raises:
        ValueError: sizes that are neither given nor in the data section, or that do not fit.
    """
    given = {"gpus": gpus, "tasks": tasks, "rows": rows, "tokens": tokens, "answer_tokens": answer_tokens}
    for name, value in given.items():
        if value is not None and value < 1:
            raise ValueError(f"{name}: {value} is below 1")
    config = config.clone()
    data, trainer = config.pop("data"), config.pop("trainer")
    data = None if data is None else data.init_args
    base = config.model.init_args.backbone.init_args
    offloaded = base.offload_activations
    base.gradient_checkpointing = base.offload_activations = False
    module = build_on_meta(config, tasks or _from(data, "tasks", len(data.tasks) if data else None))
    steps = gpus * trainer.accumulate_grad_batches
    load = Load(
        rows or _from(data, "rows", -(-data.batch_size // steps) if data else None),
        tokens or _from(data, "tokens", data.max_length if data else None),
        answer_tokens or module.max_new_tokens,
    )
    if module.backbone.kind == "causal" and load.answer_tokens >= load.tokens:
        raise ValueError(
            f"answer_tokens: {load.answer_tokens} leave no prompt in {load.tokens} tokens; give fewer, or more tokens"
        )
    sizes = given | {"tasks": len(module.specs)} | load._asdict() | {"dtype": str(module.backbone.dtype).split(".")[-1]}
    plans = plan_module(module, gpus, load, MIXED.get(str(trainer.precision).removesuffix("-mixed")), offloaded)
    return sizes | {"plans": {name: plan._asdict() | {"total": plan.total} for name, plan in plans.items()}}


def _from(data: Namespace | None, name: str, value: int | None) -> int:
    if value is None:
        raise ValueError(
            f"{name}: neither given nor in a data section; add --{name}, or --config configs/data/<file>.yaml"
        )
    return value


def plan_module(
    module: MultitaskModule, gpus: int, load: Load, autocast: torch.dtype | None = None, offloaded: bool = False
) -> dict[str, Plan]:
    """Plans a method, by strategy.

    Args:
        module: built on the meta device, without gradient checkpointing; of no other use afterwards.
        gpus: how many ranks.
        load: what every one of them processes at once.
        autocast: dtype of the trainer's mixed precision, if any.
        offloaded: whether the inputs of recomputed blocks wait in the host's memory.
    """
    frozen = [parameter for parameter in module.parameters() if not parameter.requires_grad]
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    buffers = sum(buffer.nbytes for buffer in module.buffers())
    plans = {}
    for name, ranks in (("ddp", 1), ("fsdp2", gpus)):  # DDP cuts nothing
        adapters = _cut(trained, ranks)
        states = optimizer_bytes(module.optimizer, [shard_shape(parameter.shape, ranks) for parameter in trained])
        buckets = adapters if gpus > 1 else 0
        moved = buckets if name == "ddp" else gathered_bytes(module, ranks)
        plans[name] = Plan(_cut(frozen, ranks) + buffers, adapters, adapters, states, 0, moved)
    kept = activation_bytes(module, load, autocast, offloaded)
    return {
        name + how: plan._replace(activations=activations)
        for name, plan in plans.items()
        for how, activations in (("", kept.plain), ("+checkpointing", kept.checkpointed))
    }


def shard_shape(shape: Sequence[int], ranks: int) -> tuple[int, ...]:
    """Returns the shape of the first rank's shard of a parameter, which is what the others are padded to."""
    return (-(-shape[0] // ranks), *shape[1:])


def shard_bytes(shape: Sequence[int], dtype: torch.dtype, ranks: int) -> int:
    """Returns the bytes that every rank holds of a parameter under FSDP2."""
    return math.prod(shard_shape(shape, ranks)) * dtype.itemsize


def gathered_bytes(module: MultitaskModule, ranks: int) -> int:
    """Returns the bytes that FSDP2 gathers at once: see the top of this file."""
    blocks = [
        list(block.parameters()) for block in module.built().modules() if isinstance(block, GradientCheckpointingLayer)
    ]
    within = {parameter for block in blocks for parameter in block}
    outside = [parameter for parameter in module.parameters() if parameter not in within]
    sizes = [ranks * _cut(block, ranks) for block in blocks]
    two = max((sum(sizes[at : at + 2]) for at in range(len(sizes))), default=0)
    reduced = max((_cut((p for p in block if p.requires_grad), ranks) for block in blocks), default=0) * ranks
    return ranks * _cut(outside, ranks) + two + 2 * reduced


def optimizer_bytes(make: OptimizerCallable, shapes: Sequence[tuple[int, ...]]) -> int:
    """Returns the bytes of an optimizer's states of fp32 parameters, by a step of it on each shape that occurs.

    Args:
        make: as the configuration gives it.
        shapes: of all parameters.
    """
    return sum(shapes.count(shape) * _state_bytes(make, shape) for shape in set(shapes))


def _state_bytes(make: OptimizerCallable, shape: tuple[int, ...]) -> int:
    parameter = nn.Parameter(torch.zeros(shape))
    parameter.grad = torch.zeros(shape)
    optimizer = make([parameter])
    optimizer.step()
    return sum(value.nbytes for value in optimizer.state[parameter].values() if isinstance(value, Tensor))


def _cut(parameters: Iterable[Tensor], ranks: int) -> int:
    return sum(shard_bytes(parameter.shape, parameter.dtype, ranks) for parameter in parameters)
