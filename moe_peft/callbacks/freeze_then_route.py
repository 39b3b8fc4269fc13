"""Two stages in one fit: experts first, then, with every expert frozen to the bit, the router (arXiv 2504.21190).

Nothing changes `requires_grad`, so that data-parallel wrappers stay right: the groups that a stage leaves closed take
part in every step at weight zero, and lose their gradients before clipping and the optimizer, whose decay and momentum
then cannot reach them. A group that opens starts with fresh optimizer state and a learning-rate schedule of its own.
The stage is a function of the optimizer step and of this callback's saved state, so a resumed run is in the right one.
"""

import logging
import math
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.optim import Optimizer

from moe_peft.callbacks.checkpoints import AdapterCheckpoint
from moe_peft.interop.install import collect, install
from moe_peft.methods.adapter_fusion import AdapterFusion
from moe_peft.methods.base import MultitaskModule
from moe_peft.methods.expert_rows import load_experts, with_experts
from moe_peft.methods.tt_lora_moe import TTLoRAMoE
from moe_peft.optim import WarmupDecay, parameter_groups

logger = logging.getLogger(__name__)

EXPERTS, ROUTER = frozenset({"adapters", "heads", "gates"}), frozenset({"routers"})


class FreezeThenRoute(Callback):
    """Trains all experts side by side, or takes those of other runs; then freezes them and trains the router alone.

    Each expert ends stage one as it was when its own task's validation was best. Give batches equally many rows of
    every task (`EqualRows`): then each expert learns what it would learn alone.

    Args:
        experts_steps: optimizer steps of stage one; or
        experts_epochs: its epochs; one of the two, or expert_paths, must be given.
        patience: end stage one earlier, once no expert's validation has improved for so many validations in a row.
        keep_best: false freezes the experts as the last step of stage one left them.
        expert_paths: folders of trained experts, one per task in any order, in place of stage one: what
            `tools/export.py --to expert` wrote, or LoRAs in PEFT's files, which are compressed to the mixture's rank. A
            resumed fit does not read them again.

    Raises:
        ValueError: none or several of the three, a number below 1, or patience where no expert is trained.
    """

    def __init__(
        self,
        experts_steps: int | None = None,
        experts_epochs: int | None = None,
        patience: int | None = None,
        keep_best: bool = True,
        expert_paths: list[str] | None = None,
    ) -> None:
        given = {"experts_steps": experts_steps, "experts_epochs": experts_epochs, "patience": patience}
        if sum(way is not None for way in (experts_steps, experts_epochs, expert_paths)) != 1:
            raise ValueError(
                "FreezeThenRoute: give experts_steps or experts_epochs, the length of stage one, or expert_paths; one "
                "of the three"
            )
        if expert_paths is not None and patience is not None:
            raise ValueError(
                f"FreezeThenRoute: patience {patience} ends the training of experts; expert_paths has none"
            )
        for name, value in given.items():
            if value is not None and value < 1:
                raise ValueError(f"FreezeThenRoute: {name} is {value}, it must be at least 1")
        self.experts_steps, self.experts_epochs, self.expert_paths = experts_steps, experts_epochs, expert_paths
        self.patience, self.keep_best = patience, keep_best
        self.switch_at: int | None = None
        """The optimizer step at which stage two begins, once known for certain."""
        self.opened = False
        """Whether stage two has begun."""
        self.best: dict[str, float] = {}
        self.idle = 0
        self.snapshot: dict[str, Tensor] = {}

    # ---- where the stages are ---------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuses a method without experts, and callbacks that cannot go along with two stages.

        Raises:
            ValueError: names what does not fit.
        """
        if not isinstance(pl_module, TTLoRAMoE | AdapterFusion):
            raise ValueError(f"FreezeThenRoute: {type(pl_module).__name__} has no experts; drop this callback")
        if self.expert_paths is not None and not isinstance(pl_module, TTLoRAMoE):
            raise ValueError(
                f"FreezeThenRoute: expert_paths are LoRAs, which a {type(pl_module).__name__} does not have; give "
                "experts_steps or experts_epochs"
            )
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, (EarlyStopping, WeightAveraging, StochasticWeightAveraging)):
                raise ValueError(
                    f"FreezeThenRoute: {type(callback).__name__} would stop or average across the two stages; drop it "
                    "(patience ends stage one, and every expert's best is kept)"
                )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes the experts of other runs, unless a checkpoint was restored (which no earlier hook can tell).

        Raises:
            ValueError: a folder that cannot be read, two experts of a task or none, or one that does not fit.
        """
        if self.expert_paths is None or trainer.ckpt_path is not None:
            return
        assert isinstance(pl_module, TTLoRAMoE)
        try:
            experts = collect(self.expert_paths, [spec.name for spec in pl_module.specs])
            installed = [install(pl_module, expert, task) for task, expert in enumerate(experts)]
        except ValueError as error:
            raise ValueError(f"FreezeThenRoute: expert_paths: {error}") from None
        for each in installed if trainer.is_global_zero else ():
            logger.info("%s", each)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finds the boundary, and gives each stage its own learning-rate schedule.

        Raises:
            ValueError: no end is in sight, no step is left for the router, a schedule that knows no stages, or experts
                of other runs for a fit that is to go on training its own.
        """
        if self.expert_paths is not None and trainer.ckpt_path is not None and not self.opened:
            raise ValueError("FreezeThenRoute: expert_paths cannot end a stage one that was begun; resume it as it was")
        for config in trainer.lr_scheduler_configs:
            if not isinstance(config.scheduler, WarmupDecay):
                name = type(config.scheduler).__name__
                raise ValueError(f"FreezeThenRoute: {name} would span both stages; use WarmupDecay, or scheduler: null")
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        total, boundary = trainer.estimated_stepping_batches, self.boundary(trainer)
        if math.isinf(total):
            raise ValueError("FreezeThenRoute: the fit has no end; give trainer.max_epochs or trainer.max_steps")
        if boundary >= total:
            raise ValueError(
                f"FreezeThenRoute: stage one ends at step {boundary} of {total}, which leaves the router untrained; "
                "shorten it, or raise trainer.max_epochs or trainer.max_steps"
            )
        self._set_spans(trainer, boundary, int(total))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Puts the module into the stage of this step; the first of stage two freezes the experts."""
        assert isinstance(pl_module, MultitaskModule)
        routing = trainer.global_step >= self.boundary(trainer)
        if routing and not self.opened:
            self._freeze(trainer, pl_module)
        pl_module.closed_groups = EXPERTS if routing else ROUTER

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Opens all groups again: what comes after training is decided by the checkpoint."""
        self.teardown(trainer, pl_module, "fit")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Opens all groups again, also after a fit that was interrupted."""
        assert isinstance(pl_module, MultitaskModule)
        pl_module.closed_groups = frozenset()

    def boundary(self, trainer: Trainer) -> int:
        """Returns the optimizer step at which stage two begins at the latest."""
        if self.switch_at is not None:
            return self.switch_at
        if self.expert_paths is not None:
            return 0
        if self.experts_steps is not None:
            return self.experts_steps
        assert self.experts_epochs is not None
        return self.experts_epochs * -(-int(trainer.num_training_batches) // trainer.accumulate_grad_batches)

    def _set_spans(self, trainer: Trainer, boundary: int, total: int) -> None:
        for config in trainer.lr_scheduler_configs:
            if isinstance(config.scheduler, WarmupDecay):
                for group in EXPERTS:
                    config.scheduler.set_span(group, 0, boundary)
                config.scheduler.set_span("routers", boundary, total - boundary)

    def _freeze(self, trainer: Trainer, module: MultitaskModule) -> None:
        """Begins stage two: best experts back, fresh optimizer state for the router, a fresh best checkpoint."""
        if self.keep_best and self.snapshot:
            load_experts(module, self.snapshot)
        self.opened, self.switch_at, self.snapshot = True, trainer.global_step, {}
        groups = parameter_groups(module)
        for optimizer in trainer.optimizers:
            for name in ROUTER:
                for parameter in groups.get(name, ()):
                    optimizer.state.pop(parameter, None)
        self._set_spans(trainer, trainer.global_step, int(trainer.estimated_stepping_batches))
        _forget_best(trainer)
        if trainer.is_global_zero:
            logger.info("stage two begins at step %d: experts are frozen, the router learns", trainer.global_step)

    # ---- frozen means frozen ----------------------------------------------------------------------------------------

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Takes the gradients of closed groups away, before clipping sees them."""
        assert isinstance(pl_module, MultitaskModule)
        groups = parameter_groups(pl_module)
        for name in pl_module.closed_groups:
            for parameter in groups.get(name, ()):
                parameter.grad = None

    # ---- best experts -----------------------------------------------------------------------------------------------

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keeps experts that were never better, or have no validation; ends stage one where none improves for long."""
        assert isinstance(pl_module, MultitaskModule)
        if trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
            return
        if self.opened:
            # The sums of a router without a gradient only become better: the latest are the best.
            if isinstance(pl_module, TTLoRAMoE) and not pl_module.router.learns_by_gradient:
                _forget_best(trainer)
            return
        improved, unknown = [], []
        for task, spec in enumerate(pl_module.specs):
            value = trainer.callback_metrics.get(f"val/{spec.name}/{spec.primary_metric}")
            if value is None or value.isnan():
                unknown.append(task)
            elif value.item() > self.best.get(spec.name, float("-inf")):
                self.best[spec.name] = value.item()
                improved.append(task)
        if self.keep_best and (improved or unknown):
            self.snapshot = with_experts(pl_module, self.snapshot, improved + unknown)
        self.idle = 0 if improved else self.idle + 1
        if self.patience is not None and self.idle >= self.patience and self.switch_at is None:
            self.switch_at = trainer.global_step
            if trainer.is_global_zero:
                logger.info("stage one ends at step %d: no expert has improved for long", self.switch_at)

    # ---- resume -----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Returns where the stages are, and the best experts so far."""
        return {name: getattr(self, name) for name in ("switch_at", "opened", "best", "idle", "snapshot")}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over what `state_dict` gave."""
        for name, value in state_dict.items():
            setattr(self, name, value)


def _forget_best(trainer: Trainer) -> None:
    for checkpoint in trainer.checkpoint_callbacks:
        if isinstance(checkpoint, AdapterCheckpoint):
            checkpoint.forget_best(trainer)
