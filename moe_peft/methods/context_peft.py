"""Context-PEFT (arXiv 2312.08900): which LoRA serves a token is given with the data, not learned.

    y = W0 x + (α / r) B_c A_c x,   c the context of the token

For text a context is the token's task, or its part of the row: the prompt, or the answer. Chosen by task this is what
the best router of whole rows could do (its oracle). The paper's contexts are the modalities of a caption's tokens; its
trained biases and its other adapters (IA3, BitFit) are not here.
"""

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from moe_peft.batch import Batch
from moe_peft.layers.given import WEIGHTS, GivenRouter
from moe_peft.layers.mixtures import MixtureRouter, TaskRouter
from moe_peft.methods.mixture import TaskMixture

PARTS = "prompt", "answer"


class OwnExpert(TaskRouter):
    """Gives every task the expert of its number.

    Args:
        tasks: T.
        rank: r of every expert.
        device: where.
    """

    table: Tensor

    def __init__(self, tasks: int, rank: int, device: torch.device | None = None) -> None:
        super().__init__("block", rank)
        self.register_buffer("table", torch.eye(tasks, device=device, dtype=torch.float32), persistent=False)

    def weights(self) -> Tensor:
        """Returns the identity [T, T]."""
        return self.table


class ContextPEFT(TaskMixture):
    """One LoRA for each context of a token.

    Args:
        contexts: "task": every task is one; "part": prompt and answer are, for decoder-only language models. Tokens
            that the model writes are an answer's; of a plain call's text all are the prompt's, unless it says otherwise
            (`routing(prompt_mask=...)`).
        mixture: the arguments of `Mixture` but `experts`.
    """

    def __init__(self, contexts: Literal["task", "part"] = "task", **mixture: Any) -> None:
        super().__init__(experts=1, **mixture)
        if contexts not in ("task", "part"):
            raise ValueError(f"contexts: {contexts!r} is unknown; use task or part")
        if contexts == "part" and self.backbone.kind != "causal":
            raise ValueError(
                f"contexts: part needs a CausalLM, not a {type(self.backbone).__name__}, no linear of which sees both "
                "prompt and answer; use task"
            )
        self.contexts: Literal["task", "part"] = contexts
        self.experts = len(self.specs) if contexts == "task" else len(PARTS)

    def router(self, base: torch.nn.Linear, experts: int, rank: int) -> MixtureRouter:
        """Tells the tokens' contexts, and has nothing to learn."""
        return OwnExpert(experts, rank, base.weight.device) if self.contexts == "task" else GivenRouter(rank)

    def routed_tasks(self, batch: Batch) -> Tensor | None:
        """Returns the rows' tasks [B], which there must be where they decide."""
        return super().routed_tasks(batch) if self.contexts == "task" else batch.get("task_id")

    def routing_facts(self, batch: Batch) -> dict[str, Tensor]:
        """Adds every token's part of its row."""
        facts = super().routing_facts(batch)
        if self.contexts == "task" or not self.context.enabled:
            return facts
        prompt = batch.get("prompt_mask", batch["attention_mask"]).bool()
        later = torch.ones_like(prompt[:, :1])
        return facts | {WEIGHTS: one_hot(torch.cat([~prompt, later], 1).long(), len(PARTS)).float()}

    def expert_names(self, layer: str, experts: int) -> list[str]:
        """Names experts by their contexts."""
        return [spec.name for spec in self.specs] if self.contexts == "task" else list(PARTS)
