"""MOELoRA (arXiv 2310.18339): a LoRA cut into E experts, which every task weighs for itself.

    y = W0 x + (α / (E r)) Σ_e g_e(t) B_e A_e x,   g(t) = softmax(W e_t),   e_t an embedding of task t, in every linear

Here `rank` is one expert's; the official code's is the total, E r. Its embedding has an unused row 0, which is left
out, and its gate is made for ChatGLM's layout of batches, not for others.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from moe_peft.layers.allocation import at_least
from moe_peft.layers.mixtures import Layout, TaskRouter
from moe_peft.layers.rank_selector import TaskEmbedding
from moe_peft.methods.mixture import TaskMixture


class EmbeddingRouter(TaskRouter):
    """Weighs experts by a linear map, without bias, of a task's embedding.

    Args:
        tasks: T.
        width: of an embedding.
        experts: E.
        layout: see `MixtureRouter`.
        rank: see `MixtureRouter`.
        device: where to create the parameters.
    """

    def __init__(
        self, tasks: int, width: int, experts: int, layout: Layout, rank: int, device: torch.device | None = None
    ) -> None:
        super().__init__(layout, rank)
        self.embedding = TaskEmbedding(tasks, width, device)
        nn.init.normal_(self.embedding.weight)  # torch's own, as in the official code
        self.weight = nn.Parameter(torch.empty(experts, width, device=device, dtype=torch.float32))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def weights(self) -> Tensor:
        """Returns every task's softmax over experts [T, E]."""
        table = self.embedding()
        with torch.autocast(table.device.type, enabled=False):
            return nn.functional.linear(table, self.weight).softmax(-1)


class MOELoRA(TaskMixture):
    """Experts weighed by task embeddings.

    Args:
        embedding_dim: width of the task embeddings.
        mixture: the arguments of `Mixture`.
    """

    as_lora = {"experts": 1}

    def __init__(self, embedding_dim: int = 64, **mixture: Any) -> None:
        super().__init__(**mixture)
        at_least("embedding_dim", embedding_dim, 1)
        self.embedding_dim = embedding_dim

    def scale(self, experts: int, rank: int, alpha: float) -> float:
        """α over the total rank."""
        return alpha / (experts * rank)

    def router(self, base: nn.Linear, experts: int, rank: int) -> EmbeddingRouter:
        """Task embeddings of this linear, and a linear map of them."""
        return EmbeddingRouter(len(self.specs), self.embedding_dim, experts, self.layout, rank, base.weight.device)
