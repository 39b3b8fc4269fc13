"""FSDP2 as a strategy of Lightning's whose checkpoints are those of any other strategy.

Lightning's own gathers the frozen base only to have it thrown away, and rebuilds optimizer states by a step of rate
zero, after which a parameter that was never stepped counts one step too many. Here one file holds adapters and plain
optimizer states, so that a run may go on with another strategy, or on another number of ranks.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.strategies.strategy import Strategy
from torch import Tensor
from torch.optim import Optimizer

from moe_peft.methods.base import MultitaskModule
from moe_peft.sharding import like, whole


class ShardedStrategy(ModelParallelStrategy):
    """Cuts base, adapters and optimizer states over all ranks (see `moe_peft.sharding`).

    Args:
        process_group_backend: None is NCCL on GPUs and gloo on CPUs.
    """

    def __init__(self, process_group_backend: str | None = None) -> None:
        super().__init__(save_distributed_checkpoint=False, process_group_backend=process_group_backend)

    def setup_environment(self) -> None:
        """Makes one mesh of all ranks; Lightning's "auto" would cut over one node's devices by tensor parallelism."""
        self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
        super().setup_environment()

    @contextlib.contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        """Lets the processes of a node build one after the other: each holds a whole base until it has cut it."""
        for turn in range(self.num_processes):
            if turn == self.local_rank:
                yield
            self.barrier()

    # ---- saving: gathered on all ranks, kept on rank zero ----------------------------------------------------------

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Returns the adapters' tensors, whole; the frozen base is not gathered."""
        module = self.lightning_module
        assert isinstance(module, MultitaskModule)
        return self._on_rank_zero({name: whole(value) for name, value in module.adapter_state().items()})

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Returns what the optimizer's own `state_dict` would be in one process."""
        plain = optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        return self._on_rank_zero(_mapped(plain.state_dict(), whole))

    def _on_rank_zero(self, state: dict[str, Any]) -> dict[str, Any]:
        return _mapped(state, Tensor.cpu) if self.is_global_zero else {}

    # ---- loading: every rank reads the file and takes its slices ----------------------------------------------------

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Lightning hands over the optimizer states."""
        return True

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Reads the file, as other strategies do."""
        return Strategy.load_checkpoint(self, checkpoint_path, weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Loads through the module, which takes its slices."""
        Strategy.load_model_state_dict(self, checkpoint, strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Cuts every state as its parameter is cut."""
        states = []
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            cut = {
                at: {name: _as_state_of(value, parameters[at]) for name, value in own.items()}
                for at, own in state["state"].items()
            }
            states.append(state | {"state": cut})
        Strategy.load_optimizer_state_dict(self, {"optimizer_states": states})


def _as_state_of(value: Any, parameter: Tensor) -> Any:
    """Returns an optimizer's state of a parameter: a slice where it has the parameter's shape."""
    return like(value, parameter) if isinstance(value, Tensor) and value.shape == parameter.shape else value


@torch.no_grad()
def _mapped(tree: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Returns plain containers with all tensors changed, in the same order on every rank."""
    if isinstance(tree, dict):
        return {name: _mapped(value, change) for name, value in tree.items()}
    if isinstance(tree, list):
        return [_mapped(value, change) for value in tree]
    return change(tree) if isinstance(tree, Tensor) else tree
