"""MoRE (arXiv 2505.22694): a mixture of nested low-rank experts, one LoRA of which every task uses as much as it needs.

    y = W0 x + (α / r) B diag(m_t) A x,   m_t[j] = Σ_{k: ρ_k ≥ j} c_k p̃_t[k]

Expert k is the first ρ_k ranks of one LoRA; every adapted linear picks one expert per task from a trained task
embedding (`layers.rank_selector`). The ranks depend on the task alone, so a task's update can be merged, or exported as
an ordinary LoRA. Differences from the official code, which never trains its gate: see the README.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from moe_peft.batch import Batch
from moe_peft.layers.adapted import AdaptedLinear
from moe_peft.layers.factors import DenseFactors
from moe_peft.layers.nested_experts import Scaling, expert_ranks, fixed_start, nested_experts
from moe_peft.layers.rank_selector import RankSelector, Selector, TaskEmbedding, rank_selectors
from moe_peft.methods.base import MultitaskModule
from moe_peft.methods.evaluation import routed_shares
from moe_peft.methods.task_ids import check_task_ids
from moe_peft.methods.unknown_tasks import UnknownTask, UnknownTasks
from moe_peft.predictions import Prediction
from moe_peft.sharding import gathered


class MoRE(MultitaskModule):
    """One LoRA whose rank every task chooses, linear by linear.

    Args:
        rank: r, the largest rank.
        experts: which ranks there are to choose from: N gives N ranks in even steps up to r, a list names them (the
            last one must be r), None every rank from 1 to r.
        alpha: α; the update is scaled by α / r whatever rank is chosen.
        dropout: on the adapter's input.
        selector: "full" (every expert gets its exact gradient), "winner" (only the chosen one: the official code as
            intended), "random" (the untrained gate's choice: the official code as released) or "fixed". With the last
            two the task embeddings learn from TaskContrast alone.
        fixed_rank: for the selector "fixed": one rank for all tasks, or one per task; None is r.
        scaling: of expert k by "rank_over_r" ρ_k / r, "paper" ρ_k / T (the same where T = r), "none", or "code"
            ((j / r)² on component j).
        embedding_dim: None gives every linear task embeddings of its own input width (paper); a number makes one table
            of that width which all linears share.
        rank_cost: weight of the mean expected rank over tasks and linears, as a loss term; nothing else in the loss
            prefers a small rank.
        unknown_task: a checkpoint of other tasks than the run's, at test, validate and predict: "error"; or its task
            rows are matched by name, and a task that it does not know gets the "mean" of all task embeddings, or each
            of its rows goes to the "nearest" known task (see `nearest_task`).
        common: the arguments of `MultitaskModule`.
    """

    task_decides: ClassVar[bool] = True
    scaled_by_rank: ClassVar[bool] = True
    default_rates: ClassVar[Mapping[str, float]] = {"routers": 1e-2}
    """At the adapters' rate the ranks stay where they start."""

    def __init__(
        self,
        rank: int = 8,
        experts: int | list[int] | None = None,
        alpha: float = 32.0,
        dropout: float = 0.0,
        selector: Selector = "full",
        fixed_rank: int | list[int] | None = None,
        scaling: Scaling = "rank_over_r",
        embedding_dim: int | None = None,
        rank_cost: float = 0.0,
        unknown_task: UnknownTask = "error",
        **common: Any,
    ) -> None:
        super().__init__(**common)
        self.rank, self.alpha, self.dropout = rank, alpha, dropout
        self.expert_ranks = expert_ranks(rank, experts)
        self.selector: Selector = selector
        self.scaling: Scaling = scaling
        if fixed_rank is not None and selector != "fixed":
            raise ValueError(f"fixed_rank: {fixed_rank} is given but selector is {selector!r}; set selector: fixed")
        self.start = fixed_start(self.expert_ranks, fixed_rank, len(self.specs)) if selector == "fixed" else None
        if embedding_dim is not None and embedding_dim < 1:
            raise ValueError(f"embedding_dim: {embedding_dim} is below 1; give a width, or null for one per linear")
        if rank_cost < 0:
            raise ValueError(f"rank_cost: {rank_cost} is negative, which would reward large ranks; give 0 or more")
        if rank_cost and selector in ("fixed", "random"):
            raise ValueError(
                f"rank_cost: {rank_cost} costs nothing where selector {selector!r} keeps its ranks; drop it"
            )
        if unknown_task == "mean" and selector in ("fixed", "random"):
            raise ValueError(f"unknown_task: selector {selector!r} has no gate to read a mean embedding; use nearest")
        self.rank_cost, self.embedding_dim = rank_cost, embedding_dim
        self.unknown = UnknownTasks(unknown_task, self.specs)
        self.task_embedding: TaskEmbedding | None = None

    def configure_model(self) -> None:
        """Refuses what reads whole task tables where they will be cut, then builds as every method.

        Raises:
            ValueError: unknown tasks under FSDP2.
        """
        if self._device_mesh is not None and self.unknown.how != "error":
            raise ValueError(
                f"unknown_task: {self.unknown.how} reads whole task tables, which fsdp2 cuts; train with error, and "
                "test on one device or with ddp"
            )
        super().configure_model()

    def assemble(self) -> None:
        """Makes the shared task embeddings, where there are any, then builds as every method."""
        if self.embedding_dim is not None:
            self.task_embedding = TaskEmbedding(len(self.specs), self.embedding_dim)
        super().assemble()

    def adapt(self, base: nn.Linear, slot: str) -> AdaptedLinear:
        """Dense factors of rank r, and this linear's rank selector."""
        device, tasks = base.weight.device, len(self.specs)
        if self.task_embedding is not None:
            self.task_embedding.to(device)
        selector = RankSelector(
            self.embedding_dim or base.in_features,
            nested_experts(self.expert_ranks, self.rank, tasks, self.scaling),
            tasks,
            self.selector,
            self.start,
            self.task_embedding,
            self.rank_cost > 0,
            device,
        )
        factors = DenseFactors(base.in_features, base.out_features, self.rank, self.rank, device)
        return AdaptedLinear(base, factors, selector, self.alpha / self.rank, self.dropout, self.context, slot)

    def routed_tasks(self, batch: Batch) -> Tensor | None:
        """Returns the rows of the task tables [B] that route a batch: the own task's, or for an unknown one another.

        Raises:
            ValueError: rows without a task, or a task id that there is not. -1 is an unknown task, in evaluation and
                where `unknown_task` says what to do.
        """
        own = batch.get("task_id")
        if not self.context.enabled:
            return own
        lowest = 0 if self.training or self.unknown.how == "error" or self.heads is not None else -1
        check_task_ids(own, len(self.specs), lowest, type(self).__name__)
        assert own is not None
        return self.unknown.routed(self, batch)

    def task_of_row(self, row: int) -> str:
        """Names the task of a row of the task tables."""
        return self.unknown.row_names[row]

    def routing_notes(self) -> dict[str, str]:
        """Returns how the tested rows of unknown tasks were routed."""
        return self.unknown.notes(self.specs, self.predictions["model"])

    def routing_metrics(self, predictions: Sequence[Prediction]) -> dict[str, float]:
        """Returns which share of an unknown task's rows was routed as which known task."""
        shares = routed_shares(self.specs, predictions)
        return {f"unknown/{task}/{known}": share for task, own in shares.items() for known, share in own.items()}

    def mergeable_task(self, task: str | int) -> int:
        """Refuses a task whose rows go each to its nearest known task."""
        number = super().mergeable_task(task)
        if self.unknown.how == "nearest" and number in self.unknown.tasks:
            raise ValueError(f"task: {task!r} is unknown to the checkpoint and routed row by row; merge a known task")
        return number

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses a checkpoint of other tasks in a fit; elsewhere `unknown_task` decides."""
        fitting = self._trainer is not None and self._trainer.state.fn == TrainerFn.FITTING
        if fitting or self.unknown.how == "error" or "moe_peft" not in checkpoint:
            super().on_load_checkpoint(checkpoint)
        self.representation = checkpoint["moe_peft"].get("representation")
        if not fitting and self.unknown.how != "error":
            self.unknown.load(self, checkpoint)

    def method_loss_terms(self, batch: Batch) -> dict[str, Tensor]:
        """The rank-cost penalty."""
        if self.rank_cost == 0:
            return {}
        return {"rank_cost": self.rank_cost * torch.stack(list(self.context.terms("rank_cost").values())).mean()}

    def selectors(self) -> dict[str, RankSelector]:
        """Returns the rank selectors by linear."""
        return rank_selectors(self.adapted)

    @torch.no_grad()
    def rank_table(self, start: bool = False) -> dict[str, list[int]]:
        """Returns the rank of every task by linear; with `start`, as it was before training."""
        selectors = self.selectors()
        with gathered(*selectors.values(), self.task_embedding):
            tables = {slot: each.start_ranks() if start else each.ranks() for slot, each in selectors.items()}
        return {slot: table.tolist()[: len(self.specs)] for slot, table in tables.items()}

    def expert_names(self, layer: str, experts: int) -> list[str]:
        """Names the nested experts by their ranks."""
        return [f"r{rank}" for rank in self.expert_ranks]

    @torch.no_grad()
    def landmarks(self) -> list[tuple[str, str, Tensor]]:
        """Returns every task's embedding: those of all linears side by side, each of length one."""
        selectors = self.selectors().values()
        with gathered(*selectors, self.task_embedding):
            tables = [nn.functional.normalize(selector.task_embeddings(), dim=-1).cpu() for selector in selectors]
        names = self.unknown.row_names
        return [(name, "task", vector) for name, vector in zip(names, torch.cat(tables, -1), strict=True)]

    @torch.no_grad()
    def diagnostics(self) -> dict[str, float]:
        """Mean rank per task, share of ranks that left their start, selector entropy (nats), distinct ranks."""
        now, start = (torch.tensor(list(self.rank_table(of).values())) for of in (False, True))
        selectors = self.selectors().values()
        with gathered(*selectors, self.task_embedding):
            p = torch.stack([selector.probabilities().cpu() for selector in selectors])
        entropy = -(p * p.clamp(min=1e-30).log()).sum(-1).mean().item()
        values = {
            f"rank/{spec.name}": mean for spec, mean in zip(self.specs, now.double().mean(0).tolist(), strict=True)
        }
        return values | {
            "ranks/mean": now.double().mean().item(),
            "ranks/changed": (now != start).double().mean().item(),
            "ranks/distinct": sum(len(set(row)) for row in now.tolist()) / len(now),
            "ranks/entropy": entropy,
        }
