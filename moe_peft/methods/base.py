"""MultitaskModule: what every method's LightningModule shares.

A method states how one linear is adapted (`adapt`) and, where it has them, its loss terms. It knows no paths, no
downloads and no schedules: the backbone brings the model, the data module the tasks, callbacks the schedules.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from moe_peft.backbones import KINDS, Backbone, Classifier, Kind
from moe_peft.batch import IGNORE_INDEX, Batch
from moe_peft.context import RoutingContext
from moe_peft.data.tasks import TaskSpec
from moe_peft.embedders import Embedder
from moe_peft.kernels.gated import Kernels, check_kernels
from moe_peft.layers.adapted import AdaptedLinear
from moe_peft.layers.allocation import Place, in_proportion
from moe_peft.layers.injection import find_linears
from moe_peft.layers.prior import SemanticPrior
from moe_peft.layers.representation import Representation
from moe_peft.methods import merging
from moe_peft.methods.building import Building
from moe_peft.methods.evaluation import EvaluationSteps
from moe_peft.methods.heads import TaskHeads
from moe_peft.methods.routing_hooks import RoutingHooks
from moe_peft.methods.saving import AdapterSaving
from moe_peft.methods.scoring import answer_nll, pooled_features
from moe_peft.methods.training import LossMean, TrainingSteps
from moe_peft.optim import LearningRates, WarmupDecay, WeightDecays, trained_parameters
from moe_peft.predictions import Prediction, Ranking


class MultitaskModule(Building, TrainingSteps, EvaluationSteps, AdapterSaving, RoutingHooks):
    """Base of all methods: a frozen backbone, adapted linears, and the multitask loss.

    Args:
        backbone: the frozen model.
        tasks: the tasks, in the order of their ids (linked from the data module on the command line).
        targets: linears to adapt: "all-linear" (all but the output head), a regular expression, or name suffixes.
        optimizer: class path and arguments of a torch optimizer.
        scheduler: class path and arguments of a learning-rate scheduler, stepped every optimizer step.
        lr: learning rate per parameter group where it differs from the method's own (`default_rates`) and the
            optimizer's.
        weight_decay: weight decay per parameter group where it differs from the optimizer's.
        loss_mean: "row": mean over the global batch's rows of each row's mean answer-token loss; "token": mean over
            the global batch's answer tokens; "task": the sum over tasks of each task's own mean over its rows, so that
            parameters that belong to one task learn as if it were alone. Default: the method's own, mostly "row".
        ranking: which option score decides: "sum" of log-likelihoods or "per_char" (divided by the option's length).
        max_new_tokens: length of generated answers.
        train_heads: whether the heads of a classifier backbone learn; false leaves them at their random start.
        kernels: what computes the adapters: "auto" takes Triton's kernels on a GPU and torch elsewhere; "torch" or
            "triton" forces one.
    """

    default_rates: ClassVar[Mapping[str, float]] = {}
    """The method's own learning rates of parameter groups that the optimizer's would not suit."""
    # No argument's default may differ from one method to the next: a configuration that names the method in a later
    # file than the first has been given the base class's defaults by then.
    default_loss_mean: ClassVar[LossMean] = "row"
    """Over what the task loss is averaged where `loss_mean` does not say."""
    starts_at_zero: ClassVar[bool] = True
    """Whether a new adapter changes nothing."""
    as_lora: ClassVar[Mapping[str, Any] | None] = None
    """Arguments with which the method is one LoRA (with its factors and scale), if there are any."""
    sized_by: ClassVar[str] = "rank"
    """The argument that decides how many parameters there are, all others left alone; "" where they have one number."""
    scaled_by_rank: ClassVar[bool] = False
    """Whether updates are scaled by α / r."""
    kinds: ClassVar[tuple[Kind, ...]] = KINDS
    """Kinds of backbones that the method serves."""
    missing_prior: Literal["error", "token_only"] = "error"
    """What to do where a method has a prior that was never fitted."""

    def __init__(
        self,
        backbone: Backbone,
        tasks: list[TaskSpec],
        targets: str | list[str] = "all-linear",
        optimizer: OptimizerCallable = torch.optim.AdamW,
        scheduler: LRSchedulerCallable | None = WarmupDecay,
        lr: LearningRates | None = None,
        weight_decay: WeightDecays | None = None,
        loss_mean: LossMean | None = None,
        ranking: Ranking = "sum",
        max_new_tokens: int = 16,
        train_heads: bool = True,
        kernels: Kernels = "auto",
    ) -> None:
        super().__init__()
        if not tasks:
            raise ValueError("tasks: the list is empty; name at least one task")
        if backbone.kind not in self.kinds:
            raise ValueError(
                f"backbone: {type(self).__name__} serves a {' or '.join(self.kinds)} backbone, and a "
                f"{type(backbone).__name__} is {backbone.kind}; give another backbone, or another method"
            )
        check_kernels(kernels)
        self.backbone, self.specs, self.targets = backbone, list(tasks), targets
        self.optimizer, self.scheduler = optimizer, scheduler
        self.lr, self.weight_decay = lr or LearningRates(), weight_decay or WeightDecays()
        self.loss_mean: LossMean = loss_mean or self.default_loss_mean
        self.max_new_tokens, self.train_heads = max_new_tokens, train_heads
        self.ranking: Ranking = ranking
        self.context = RoutingContext(kernels)
        self.adapted: dict[str, AdaptedLinear] = {}
        self.places: dict[str, Place] = {}
        """At which depth each of the adapted linears lies."""
        self.model: nn.Module | None = None
        self.heads: TaskHeads | None = None
        self.prior: SemanticPrior | None = None
        self.config: dict[str, Any] | None = None
        self.recomputed = []
        self.cut_from: dict[str, str] = {}
        """What told the base and the trainable parameters before they were cut, of which every rank had its own."""
        self.fingerprint = ""
        self.representation: Representation | None = None
        """What a row's vector was where inputs were drawn to task embeddings (by TaskContrast), else None."""
        self.route_by_task = False
        """Whether every row must be served as its own task's, whatever a router would say (exports are compared so)."""
        self.merged_task: int | None = None
        """The task that is merged, where the method's cores depend on the task."""
        # The checkpoint holds adapters only; `load_state_dict` makes its own, stricter check.
        self.strict_loading = False

    # ---- what a method defines -------------------------------------------------------------------------------------

    @classmethod
    def resized(cls, arguments: Mapping[str, Any], size: int | list[int]) -> dict[str, Any]:
        """Returns the arguments that give the method another size and leave the scale of its updates as it is.

        Args:
            arguments: the method's, at the size it has.
            size: of `sized_by`.
        """
        own: dict[str, Any] = {cls.sized_by: size}
        if cls.scaled_by_rank and cls.sized_by == "rank":
            own["alpha"] = in_proportion(arguments["alpha"], arguments["rank"], size)
        return own

    @property
    def embedder(self) -> Embedder | None:
        """What the method reads prompts with, if it does; part of a checkpoint's identity."""
        return None if self.prior is None else self.prior.embedder

    def slots(self, model: nn.Module) -> list[str]:
        """Names the linears that are adapted, in the model's order: those that `targets` means."""
        return find_linears(model, self.targets)

    def adapt(self, base: nn.Linear, slot: str) -> AdaptedLinear:
        """Builds the adapter of one linear."""
        raise TypeError(f"{type(self).__name__} must implement adapt(base, slot)")

    def method_loss_terms(self, batch: Batch) -> dict[str, Tensor]:
        """Returns the method's own named, weighted loss terms."""
        return {}

    def task_of_row(self, row: int) -> str:
        """Names the task of a row of the method's task tables, which `routed_tasks` gives."""
        return self.specs[row].name

    def routing_notes(self) -> dict[str, str]:
        """Returns what a table of the tested predictions must say of how tasks were routed, by task."""
        return {}

    def routing_metrics(self, predictions: Sequence[Prediction]) -> dict[str, float]:
        """Returns numbers to log about where the rows of an evaluation were routed, by name."""
        return {}

    def diagnostics(self) -> dict[str, float]:
        """Returns numbers worth a look now and then (logged after every validation)."""
        return {}

    # ---- merging ----------------------------------------------------------------------------------------------------

    def mergeable_task(self, task: str | int) -> int:
        """Returns the id of a task, by name or id, all rows of which are routed alike."""
        return merging.task_number(self, task)

    def merge(self, task: str | int | None = None) -> None:
        """Folds the adapters into the base weights: the forward is then the bare base's, at its cost.

        Heads stay apart, checkpoints stay what they were, and `unmerge` restores every weight to the bit.

        Args:
            task: by name or id; may be left out by a method that treats all tasks alike.

        Raises:
            ValueError: merged already, no such task, none where one is needed, or cores that depend on the input.
        """
        merging.merge(self, task)

    def unmerge(self) -> None:
        """Takes the adapters out of the base weights again.

        Raises:
            ValueError: nothing is merged.
        """
        merging.unmerge(self)

    # ---- forward and loss -------------------------------------------------------------------------------------------

    def routed_tasks(self, batch: Batch) -> Tensor | None:
        """Returns the task ids [B] that routers see: the rows' own, if the batch names them."""
        return batch.get("task_id")

    def head_tasks(self, batch: Batch) -> Tensor:
        """Returns the task ids [B] whose heads answer the rows of a batch in evaluation: the rows' own; -1 for none."""
        return batch["task_id"]

    def begin(self, batch: Batch) -> None:
        """Publishes the batch's routing facts: task ids, and the semantic prior where the method has one."""
        merging.refuse_other_tasks(self, batch)
        key = self.context.begin(batch["input_ids"], batch["attention_mask"])
        for name, fact in self.routing_facts(batch).items():
            self.context.put(name, fact, key)

    def routing_facts(self, batch: Batch) -> dict[str, Tensor]:
        """Returns what routers may ask of the batch: facts [B, ...] by name."""
        tasks = self.routed_tasks(batch)
        facts = {} if tasks is None else {"task_id": tasks}
        wanted = self.prior is not None and self.context.enabled
        if self.prior is not None and wanted and (self.prior.fitted or self.missing_prior == "error"):
            facts["prior"] = self.prior(batch)
        return facts

    def forward(self, batch: Batch) -> Tensor:
        """Returns the row losses [B] (fp32): mean answer-token loss, or the head's loss."""
        self.begin(batch)
        return self.row_losses(batch)[0]

    def row_losses(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Returns each row's mean loss [B] and its summed loss [B]; the batch has begun."""
        model = self.built()
        if self.heads is not None:
            assert isinstance(self.backbone, Classifier)
            loss = self.heads.losses(pooled_features(self.backbone, model, batch), batch["task_id"], batch["target"])
            return loss, loss
        nll = answer_nll(self.backbone, model, batch)
        tokens = (batch["labels"] != IGNORE_INDEX).sum(1)
        return nll.sum(1) / tokens, nll.sum(1)

    def trainable_parameters(self) -> int:
        """Counts trainable numbers."""
        return sum(parameter.numel() for parameter in trained_parameters(self).values())
