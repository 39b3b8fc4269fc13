"""FSDP2 as a strategy of Lightning's whose checkpoints are those of any other strategy.

Lightning's own gathers the frozen base only to have it thrown away, and rebuilds optimizer states by a step of rate
zero, after which a parameter that was never stepped counts one step too many. Here one file holds adapters and plain
optimizer states, so that a run may go on with another strategy, or on another number of ranks.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from lightning.pytorch.strategies.strategy import Strategy
from torch import Tensor
from torch.optim import Optimizer

from moe_peft.agreement import agree
from moe_peft.methods.base import MultitaskModule
from moe_peft.sharding import like, whole


class ShardedStrategy(ModelParallelStrategy):
    """Cuts base, adapters and optimizer states over all ranks (see `moe_peft.sharding`).

    Args:
        process_group_backend: None is NCCL on GPUs and gloo on CPUs.
        timeout_minutes: how long a rank waits for another, which may still be loading a large base.
    """

    def __init__(self, process_group_backend: str | None = None, timeout_minutes: float = 120) -> None:
        super().__init__(
            save_distributed_checkpoint=False,
            process_group_backend=process_group_backend,
            timeout=timedelta(minutes=timeout_minutes),
        )

    def setup_environment(self) -> None:
        """Makes one mesh of all ranks; Lightning's "auto" would cut over one node's devices by tensor parallelism."""
        self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
        super().setup_environment()

    @contextlib.contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        """Lets the processes of a node build one after the other: each holds a whole base until it has cut it."""
        for _ in range(self.local_rank):
            self.barrier()
        try:
            yield
        finally:  # a process that fails lets the others find out for themselves
            for _ in range(self.local_rank, self.num_processes):
                self.barrier()

    def setup(self, trainer: Trainer) -> None:
        """Compares what every rank cut its slices from, then sets up.

        Raises:
            ValueError: ranks with other bases, or adapters that were drawn otherwise.
        """
        module = self.lightning_module
        assert isinstance(module, MultitaskModule)
        agree(module.cut_from)
        super().setup(trainer)

    def setup_optimizers(self, trainer: Trainer) -> None:
        """Sets up, and refuses optimizers that look at whole tensors.

        Raises:
            ValueError: names the optimizer.
        """
        super().setup_optimizers(trainer)
        for optimizer in self.optimizers:
            if isinstance(optimizer, (torch.optim.Adafactor, torch.optim.LBFGS, torch.optim.Muon)):
                name = type(optimizer).__name__
                raise ValueError(f"optimizer: {name} cannot step slices of tensors; use AdamW or SGD, or strategy ddp")

    # ---- saving: gathered on all ranks, kept on rank zero ----------------------------------------------------------

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Returns the adapters' tensors, whole; the frozen base is not gathered."""
        module = self.lightning_module
        assert isinstance(module, MultitaskModule)
        return self._on_rank_zero(module.adapter_state())

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Returns what the optimizer's own `state_dict` would be in one process."""
        plain = optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        return self._on_rank_zero(plain.state_dict())

    def _on_rank_zero(self, state: dict[str, Any]) -> dict[str, Any]:
        """Gathers one tensor after the other, which only rank zero keeps, in its host's memory."""

        def take(own: Tensor) -> Tensor | None:
            value = whole(own)
            return value.cpu() if self.is_global_zero else None

        found = _mapped(state, take)
        return found if self.is_global_zero else {}

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
        """Cuts every state as its parameter is cut.

        Raises:
            ValueError: the checkpoint's optimizer has other parameters.
        """
        states = []
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            if len(parameters) != (there := sum(len(group["params"]) for group in state["param_groups"])):
                raise ValueError(
                    f"the checkpoint's optimizer has {there} parameters, this run's {len(parameters)}; resume with the "
                    "same callbacks and options"
                )
            cut = {
                at: {name: _as_state_of(value, parameters[at]) for name, value in own.items()}
                for at, own in state["state"].items()
            }
            states.append(state | {"state": cut})
        Strategy.load_optimizer_state_dict(self, {"optimizer_states": states})


StrategyRegistry.register("fsdp2", ShardedStrategy, "FSDP2 (see moe_peft.strategies)", override=True)


def _as_state_of(value: Any, parameter: Tensor) -> Any:
    """Returns an optimizer's state of a parameter: a slice where it has the parameter's shape."""
    return like(value, parameter) if isinstance(value, Tensor) and value.shape == parameter.shape else value


@torch.no_grad()
def _mapped(tree: Any, change: Callable[[Tensor], Any]) -> Any:
    """Returns plain containers with all tensors changed, in the same order on every rank."""
    if isinstance(tree, dict):
        return {name: _mapped(value, change) for name, value in tree.items()}
    if isinstance(tree, list):
        return [_mapped(value, change) for value in tree]
    return change(tree) if isinstance(tree, Tensor) else tree
