"""TT-LoRA MoE (arXiv 2504.21190): one tensor-train expert per task, frozen, then routed.

    y_b = W0 x_b + α ΔW_e(b) x_b,   e(b) = argmax router(feature of the frozen base for row b)

Experts learn from the rows of their own tasks, the router from which task a row is of: since its features come from
the frozen base and its choice is one-hot, neither learns from the other. The `FreezeThenRoute` callback trains them one
after the other; without it they learn side by side. One choice per row serves all layers, at every token.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from moe_peft.batch import Batch
from moe_peft.context import Routing
from moe_peft.embedders import Embedder, HiddenStates
from moe_peft.embedders.base import exact
from moe_peft.layers.expert_cache import NULL, ExpertCache
from moe_peft.layers.expert_router import ExpertRouter, LinearRouter
from moe_peft.layers.experts import ExpertLinear
from moe_peft.layers.factors import TensorTrainFactors, TrainInit
from moe_peft.methods.base import MultitaskModule
from moe_peft.methods.evaluation import CONFIDENCE
from moe_peft.methods.expert_clipping import ExpertClipping
from moe_peft.methods.refusal import NO_LIMIT
from moe_peft.methods.routing_report import router_accuracy, router_notes
from moe_peft.methods.task_ids import check_task_ids
from moe_peft.methods.training import LossMean
from moe_peft.methods.tt_lora import Shapes, check_shapes, layout_for
from moe_peft.predictions import NOBODY, Prediction

MEGABYTE = 2**20
EVERYWHERE = "all"
"""Under which the one choice that serves all layers is recorded."""


class TTLoRAMoE(ExpertClipping, MultitaskModule):
    """One tensor-train expert per task and a router that picks one per row.

    Args:
        rank: r of every expert, at all inner bonds.
        alpha: α, the scale of the update.
        dropout: on the experts' input.
        shapes: modes by size of linear (see `TTLoRA`).
        init: how experts start, "zero" or "official".
        features: what the router reads of a prompt; default: the last hidden state of the frozen base, at the last
            token of a decoder and averaged over tokens otherwise, computed once per text (`HiddenStates`).
        router: what chooses the expert: `LinearRouter` (default) learns by gradient, `PrototypeRouter` and
            `RidgeRouter` from sums over the rows that they are shown.
        router_weight: weight of the router's cross-entropy, where it learns by gradient.
        straight_through: while the router learns and the experts are frozen, send the rows to the chosen experts, and
            let the task loss reach the router through the chosen one's probability.
        routing: of test and predict, "learned" by the router, or "oracle": every row goes to its own task's expert;
            "auto" is learned once the router was trained. A fit validates what its stage trains.
        cache_megabytes: memory for folded experts where nothing learns.
        common: the arguments of `MultitaskModule`; `loss_mean` is "task" here, any other couples the experts.
    """

    default_rates: ClassVar[Mapping[str, float]] = {"routers": 1e-3}
    default_loss_mean: ClassVar[LossMean] = "task"
    router_trained: Tensor
    """[] bool: whether the router has made a step."""
    null_below: Tensor
    """[] fp32: a row that the router is less sure of is served by the bare base (see the NullExpert callback)."""

    def __init__(
        self,
        rank: int = 5,
        alpha: float = 16.0,
        dropout: float = 0.0,
        shapes: Shapes | None = None,
        init: TrainInit = "zero",
        features: Embedder | None = None,
        router: ExpertRouter | None = None,
        router_weight: float = 21.0,
        straight_through: bool = False,
        routing: Literal["auto", "learned", "oracle"] = "auto",
        cache_megabytes: int = 512,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        check_shapes(shapes or {})
        if router_weight <= 0:
            raise ValueError(f"router_weight: {router_weight} leaves the router without a loss; give more than 0")
        self.rank, self.alpha, self.dropout, self.shapes = rank, alpha, dropout, shapes or {}
        self.init: TrainInit = init
        self.features = features or HiddenStates(None, "auto")
        self.router = router or LinearRouter()
        if straight_through and not self.router.learns_by_gradient:
            raise ValueError(
                f"straight_through: a {type(self.router).__name__} learns by no gradient; use LinearRouter"
            )
        self.router_weight, self.straight_through = router_weight, straight_through
        self.routing, self.cache_megabytes = routing, cache_megabytes
        self.cache: ExpertCache | None = None
        self._scores: Tensor | None = None

    # ---- building ---------------------------------------------------------------------------------------------------

    def assemble(self) -> None:
        """Builds as every method, then the router on the features' width."""
        super().assemble()
        self.features.bind(self.backbone, self.built(), self.context)
        device = self.features.center.device
        self.router.build(len(self.features.center), len(self.specs), device)
        self.register_buffer("router_trained", torch.zeros((), dtype=torch.bool, device=device))
        self.register_buffer("null_below", torch.full((), NO_LIMIT, device=device))
        self.router.train(self.training)
        self.cache = ExpertCache(self.expert_layers(), self.cache_megabytes * MEGABYTE)

    def adapt(self, base: nn.Linear, slot: str) -> ExpertLinear:
        """One expert per task, stacked."""
        layout = layout_for(base, self.shapes)
        factors = TensorTrainFactors(layout, self.rank, self.init, len(self.specs), base.weight.device)
        return ExpertLinear(base, factors, self.alpha, self.dropout, self.context, slot)

    def expert_layers(self) -> list[ExpertLinear]:
        """Lists the adapted linears."""
        return [layer for layer in self.adapted.values() if isinstance(layer, ExpertLinear)]

    @property
    def embedder(self) -> Embedder:
        """What the router reads prompts with."""
        return self.features

    # ---- routing ----------------------------------------------------------------------------------------------------

    @property
    def routes(self) -> bool:
        """Whether rows go where the router sends them, rather than to their own tasks' experts, if they name those."""
        if self.merged_task is not None or self.route_by_task:
            return False
        if self.training:
            return self.straight_through and "adapters" in self.closed_groups
        if self.closed_groups:  # validation within a stage rates what the stage trains
            return "routers" not in self.closed_groups
        return self.routing == "learned" or (self.routing == "auto" and bool(self.router_trained))

    def prompt_features(self, batch: Batch) -> Tensor:
        """Returns what the router reads of the batch's prompts: [B, d] fp32, without a gradient."""
        with exact(self.features.center.device):
            return self.features.raw(batch)

    def scores(self, batch: Batch) -> Tensor:
        """Returns the router's scores [B, E] of the batch's prompts."""
        return self.router(self.prompt_features(batch))

    def choose(self, scores: Tensor) -> Tensor:
        """Returns the expert [B] of the largest of the scores [B, E]; -1 where the router is not sure of any."""
        return scores.argmax(-1).masked_fill(self.router.confidence(scores) < self.null_below, NULL)

    def routed_tasks(self, batch: Batch) -> Tensor | None:
        """Returns the expert [B] that serves each row; -1 is the bare base.

        Raises:
            ValueError: the router was asked for and never trained, or a task id that there is not.
        """
        own = batch.get("task_id")
        if not self.context.enabled:
            return own
        check_task_ids(own, len(self.specs))
        if own is not None and not self.routes:
            return own
        if not (self.training or self.router_trained):
            raise ValueError(
                "routing: the router was never trained; train it first, or use routing: oracle with the rows' own tasks"
            )
        self._scores = self.scores(batch)
        return self._scores.argmax(-1) if self.training else self.choose(self._scores)

    def expert_names(self, layer: str, experts: int) -> list[str]:
        """Names experts by their tasks; the last may be nobody."""
        return [*(spec.name for spec in self.specs), NOBODY][:experts]

    def prompt_vectors(self, batch: Batch) -> Tensor:
        """Returns the router's features."""
        return self.router.prepare(self.prompt_features(batch))

    def head_tasks(self, batch: Batch) -> Tensor:
        """The chosen expert's head answers."""
        chosen = self.context.get("task_id", len(batch["input_ids"]))
        return batch["task_id"] if chosen is None else chosen

    def routing_facts(self, batch: Batch) -> dict[str, Tensor]:
        """Adds what the layers need of each row's expert, and how sure the router was of it.

        Its weight where that has a gradient; elsewhere its line in the table of folded experts.
        """
        self._scores = None
        facts = super().routing_facts(batch)
        if not self.context.enabled or "task_id" not in facts:
            return facts
        if self._scores is not None and self.training:
            chosen = self._scores.softmax(-1).gather(1, facts["task_id"].unsqueeze(1)).squeeze(1)
            facts["weight"] = 1 + (chosen - chosen.detach())  # exactly 1
        elif self._scores is not None:
            facts[CONFIDENCE] = self.router.confidence(self._scores)
        if self._scores is not None and self.context.observed:
            weights = self.router.weights(self._scores, facts["task_id"], bool(self.null_below > NO_LIMIT))
            self.context.record(EVERYWHERE, Routing(weights.unsqueeze(1)))
        assert self.cache is not None
        # None where experts learn, too: all is forgotten there.
        line = None if self.merged_task is not None else self.cache.lines(facts["task_id"])
        return facts if line is None else facts | {"line": line}

    def task_of_row(self, row: int) -> str:
        """Names an expert; -1 is none of them."""
        return NOBODY if row < 0 else self.specs[row].name

    def routing_metrics(self, predictions: Sequence[Prediction]) -> dict[str, float]:
        """Returns the share of all rows, and of every task's, that reached the right expert; a refused row did not."""
        return router_accuracy(self.specs, predictions) if self.routes else {}

    def routing_notes(self) -> dict[str, str]:
        """Returns how the tested rows found their experts."""
        if self.routes:
            return router_notes(self.specs, self.predictions["model"])
        return {spec.name: "every row went to its own task's expert" for spec in self.specs}

    # ---- losses -----------------------------------------------------------------------------------------------------

    def step_losses(self, batch: Batch) -> dict[str, Tensor]:
        """The task loss unless only the router learns, whose choice it cannot reach, and the router's own loss."""
        if "adapters" in self.closed_groups and not self.straight_through:
            return self.method_loss_terms(batch)
        return super().step_losses(batch)

    def method_loss_terms(self, batch: Batch) -> dict[str, Tensor]:
        """Cross-entropy of the router's scores with the rows' own tasks, averaged over the global batch's rows.

        A router without a gradient takes the rows into its sums instead.
        """
        if "routers" in self.closed_groups:
            return {}
        if self.training:  # what was calibrated on the router as it was
            self.null_below.fill_(NO_LIMIT)
        if not self.router.learns_by_gradient:
            if self.training:
                self.router.observe(self.prompt_features(batch), batch["task_id"])
                self.router_trained.fill_(True)
            return {}
        scores, self._scores = self.scores(batch) if self._scores is None else self._scores, None
        loss = cross_entropy(scores, batch["task_id"], reduction="sum") / batch["rows_share"]
        if self.training:
            self.router_trained.fill_(True)
        return {"router_loss": self.router_weight * loss}
