"""PaLoRA (arXiv 2407.08056): one LoRA per task, blended by a preference λ among tasks, and trained for all of them.

    y = W0 x + (α / r) Σ_t λ_t B_t A_t x,   loss = Σ_t λ_t L_t,   λ on the simplex, the same for the whole batch

Every step of the optimizer draws a λ, spread at first, at single tasks in the end. How far training is comes from the
trainer, as the schedule's length does: what λ depends on is the method's own, and forgotten with no callback. After
training any λ can be asked for; a row's own task alone is the default. In the official code the base learns too, and
adapters have T times its learning rate; with a frozen base this is a variant of it.
"""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from moe_peft.batch import Batch
from moe_peft.layers.task_routers import PREFERENCE, PreferenceRouter
from moe_peft.methods.mixture import TaskMixture
from moe_peft.methods.preferences import AnnealedDirichlet, PreferenceSampler
from moe_peft.methods.training import LossMean


class PaLoRA(TaskMixture):
    """One LoRA per task, blended by preference.

    Args:
        sampler: what draws λ for every step; default: `AnnealedDirichlet`, for any number of tasks.
        preference: λ of evaluation, merging and export by task, shares that sum to 1 (a task left out has none); None
            serves every row with its own task's LoRA alone.
        mixture: the arguments of `Mixture` but `experts`; `loss_mean` is "task", of which λ are the weights.
    """

    default_loss_mean: ClassVar[LossMean] = "task"

    def __init__(
        self, sampler: PreferenceSampler | None = None, preference: dict[str, float] | None = None, **mixture: Any
    ) -> None:
        super().__init__(experts=1, **mixture)
        self.experts = len(self.specs)
        if self.loss_mean != "task":
            raise ValueError(f"loss_mean: {self.loss_mean!r} has no loss per task for λ to weigh; leave it out")
        self.sampler = sampler or AnnealedDirichlet()
        self.sampler.check(len(self.specs))
        self.preference = self._shares(preference)

    def router(self, base: nn.Linear, experts: int, rank: int) -> PreferenceRouter:
        """λ as it is."""
        router = PreferenceRouter(experts, self.layout, rank, base.weight.device)
        if self.preference is not None:
            router.table.copy_(self.preference)
        return router

    # ---- preferences ------------------------------------------------------------------------------------------------

    def _shares(self, preference: Mapping[str, float] | None) -> Tensor | None:
        """Returns a preference as λ [T].

        Raises:
            ValueError: a task that there is not, or no shares.
        """
        if preference is None:
            return None
        names = [spec.name for spec in self.specs]
        for name, share in preference.items():
            if name not in names:
                raise ValueError(f"preference: there is no task {name!r}; use some of {', '.join(names)}")
            if not 0 <= share <= 1:
                raise ValueError(f"preference: the share {share} of {name!r} is not between 0 and 1")
        if not math.isclose(sum(preference.values()), 1, abs_tol=1e-4):
            raise ValueError(f"preference: the shares sum to {sum(preference.values()):g}; make them sum to 1")
        return torch.tensor([preference.get(name, 0.0) for name in names])

    def prefer(self, preference: Mapping[str, float] | None) -> None:
        """Serves, merges and exports another preference from the next batch on; None: every row its own task's.

        Raises:
            ValueError: see `preference`, or a merged model.
        """
        shares = self._shares(preference)
        if any(layer.merged for layer in self.adapted.values()):
            raise ValueError("preference: the model is merged for another one; call unmerge() first")
        self.preference = shares
        for layer in self.adapted.values():
            assert isinstance(layer.router, PreferenceRouter)
            layer.router.table.copy_(torch.eye(len(self.specs)) if shares is None else shares)
        self.context.forget_held()

    def drawn(self) -> Tensor:
        """Returns the λ [T] of the running step."""
        step, progress = 0, 0.0
        if self._trainer is not None:
            step = self.trainer.global_step
            progress = min(1.0, step / max(1, self.trainer.estimated_stepping_batches))
        return self.sampler.draw(len(self.specs), step, progress)

    def on_fit_start(self) -> None:
        """Refuses a fit whose length is not known."""
        if math.isinf(self.trainer.estimated_stepping_batches):
            raise ValueError(
                "sampler: preferences are annealed over all steps, which trainer.max_time alone does not tell; give "
                "trainer.max_steps or trainer.max_epochs too"
            )

    def routed_tasks(self, batch: Batch) -> Tensor | None:
        """Returns the rows' tasks [B], which a given preference does without."""
        if self.preference is not None and not self.training and "task_id" not in batch:
            return None
        return super().routed_tasks(batch)

    def routing_facts(self, batch: Batch) -> dict[str, Tensor]:
        """Adds every row's λ."""
        facts, rows = super().routing_facts(batch), batch["input_ids"]
        if not self.context.enabled:
            return facts
        if self.training:
            shares = self.drawn().to(rows.device).expand(len(rows), -1)
        elif self.preference is not None:
            shares = self.preference.to(rows.device).expand(len(rows), -1)
        else:
            shares = nn.functional.one_hot(facts["task_id"], len(self.specs)).float()
        return facts | {PREFERENCE: shares}

    def expert_names(self, layer: str, experts: int) -> list[str]:
        """Names experts by their tasks."""
        return [spec.name for spec in self.specs]

    def step_losses(self, batch: Batch) -> dict[str, Tensor]:
        """Σ_t λ_t L_t, L_t the mean over the global batch's rows of task t."""
        means, _ = self.row_losses(batch)
        self.row_loss = means.detach()
        preference = self.context.get(PREFERENCE, len(means))
        assert preference is not None
        weights = preference.gather(1, batch["task_id"].unsqueeze(1)).squeeze(1)
        return {"task_loss": (weights * means / batch["task_share"]).sum()}

    def merge(self, task: str | int | None = None) -> None:
        """Folds a task's LoRA, or with a preference its blend, for which no task need be named, into the base."""
        if self.preference is None:
            return super().merge(task)
        super().merge(0 if task is None else task)
        self.merged_task = None  # it serves all tasks
