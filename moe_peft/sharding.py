"""FSDP2: a method cut over all ranks by `fully_shard`, and what code outside a forward may do with the pieces.

Every block of the backbone is gathered when it is entered and cut again when it is left; so is the root, which holds
the rest. Whatever else a method trains (heads, a router, shared task embeddings) is a root of its own and must be
entered through its own forward. Both faults are silent otherwise (a router that never moves, ranks that drift apart),
so a trainable parameter that no root took is refused. Outside a forward a parameter is a `DTensor`, one slice per rank.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from moe_peft.quirks import keep_recordable

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from moe_peft.methods.base import MultitaskModule

T = TypeVar("T")


def shard(module: "MultitaskModule", mesh: "DeviceMesh") -> None:
    """Cuts a built method over the ranks of a mesh, which must all hold the same values (`ShardedStrategy` compares).

    Args:
        module: built; its base is on the CPU, and goes to the mesh's device block by block.
        mesh: one-dimensional. Nothing is sent, so that ranks may come one after the other.

    Raises:
        ValueError: a trainable parameter that belongs to no module which is entered by itself.
    """
    from torch.distributed.fsdp import fully_shard

    model = module.built()
    shard_backbone(model, mesh)
    for child in module.children():
        if child is not model and any(parameter.requires_grad for parameter in child.parameters()):
            fully_shard(child, mesh=mesh, reshard_after_forward=False)
    for name, parameter in module.named_parameters():
        if parameter.requires_grad and not isinstance(parameter, DTensor):
            raise ValueError(
                f"strategy: {name} is trained but lies in no module that FSDP2 cuts, so that its ranks would drift "
                "apart; hold it in a child module of the method that is called as a module"
            )


def shard_backbone(model: nn.Module, mesh: "DeviceMesh") -> None:
    """Cuts a Hugging Face model, block by block, and gives it `enter` (see there)."""
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
    from transformers.modeling_layers import GradientCheckpointingLayer

    blocks = [block for block in model.modules() if isinstance(block, GradientCheckpointingLayer)]
    if not blocks:
        rank_zero_warn(
            f"{type(model).__name__} has no blocks that can be gathered one by one: every step gathers it whole, so "
            "that sharding saves no memory while it runs"
        )
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    keep_recordable(model)
    setattr(model, "enter", _call)  # noqa: B010  (typed as a module)
    register_fsdp_forward_method(model, "enter")


def _call(function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    return function(*args, **kwargs)


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 cuts the model: then every rank must run it equally often, and to the end."""
    from torch.distributed.fsdp import FSDPModule

    return any(isinstance(part, FSDPModule) for part in model.modules())


def enter(model: nn.Module, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """Calls what goes past the model's own forward (`generate`, an encoder alone) with the model's root gathered."""
    return model.enter(function, *args, **kwargs) if hasattr(model, "enter") else function(*args, **kwargs)  # type: ignore[operator]


def release(module: nn.Module) -> None:
    """Cuts again what a forward without a backward left gathered, so that `parameters()` are the optimizer's."""
    from torch.distributed.fsdp import FSDPModule

    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


@contextlib.contextmanager
def gathered(*modules: nn.Module | None) -> Iterator[None]:
    """Within: the modules' parameters are whole, on every rank, to be read outside a forward; all ranks must enter."""
    held: list[tuple[nn.Module, str, nn.Parameter]] = []
    for module in modules:
        for part in module.modules() if module is not None else ():
            release(part)
            for name, parameter in part._parameters.items():
                if isinstance(parameter, DTensor):
                    held.append((part, name, parameter))
                    part._parameters[name] = nn.Parameter(whole(parameter), requires_grad=False)
    try:
        yield
    finally:
        for part, name, parameter in held:
            release(part)  # a root of its own that was entered meanwhile
            part._parameters[name] = parameter


def local(tensor: Tensor) -> Tensor:
    """Returns this rank's slice of a tensor: the tensor itself, unless it is cut."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """Returns all of a tensor, without a gradient; where it is cut, all ranks must ask."""
    if not isinstance(tensor, DTensor):
        return tensor.detach()
    if tensor.placements != (Shard(0),):  # an optimizer's number for a parameter, say
        return tensor.full_tensor().detach()
    # Not `full_tensor`, which kills processes on CPUs now and then: its gather has a name too long to be kept in place,
    # and both threads of a gloo group, which note without a lock what they did last, may free that text (torch 2.13).
    own, mesh = tensor.to_local().detach(), tensor.device_mesh
    size = -(-len(tensor) // mesh.size())
    padded = own.new_zeros(size, *tensor.shape[1:])
    padded[: len(own)] = own
    parts = [torch.empty_like(padded) for _ in range(mesh.size())]
    distributed.all_gather(parts, padded, group=mesh.get_group())
    return torch.cat([part[: max(0, len(tensor) - at * size)] for at, part in enumerate(parts)])


def like(value: Tensor, own: Tensor) -> Tensor:
    """Returns a whole tensor, which every rank has, cut as another one is."""
    if not isinstance(own, DTensor):
        return value
    return distribute_tensor(value.to(own.device), own.device_mesh, own.placements, src_data_rank=None)


@torch.no_grad()
def assign(own: Tensor, value: Tensor) -> None:
    """Copies a whole tensor, which every rank has, into a parameter."""
    own.copy_(like(value.to(own.dtype), own))


@contextlib.contextmanager
def edited(parameter: Tensor) -> Iterator[Tensor]:
    """Within: a whole copy of a parameter, to be changed alike on every rank, whose values it then takes."""
    value = whole(parameter).clone()
    yield value
    assign(parameter, value)


def rows_of(tensor: Tensor) -> slice:
    """Returns which rows (of dimension 0) of a tensor this rank's slice holds."""
    if not isinstance(tensor, DTensor):
        return slice(0, len(tensor))
    size = -(-len(tensor) // tensor.device_mesh.size())
    first = min(len(tensor), tensor.device_mesh.get_local_rank() * size)
    return slice(first, min(len(tensor), first + size))
