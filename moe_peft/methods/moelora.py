"""MOELoRA (arXiv 2310.18339): a LoRA cut into E experts, which every task weighs for itself.

    y = W0 x + (α / (E r)) Σ_e g_e(t) B_e A_e x,   g(t) = softmax(W e_t),   e_t an embedding of task t, in every linear

Here `rank` is one expert's; the official code's is the total, E r. Its embedding has an unused row 0, which is left
out, its A starts as N(0, 0.01) where here it starts as LoRA's, and its gate is made for ChatGLM's layout of batches,
not for others.
"""

from typing import Any

from torch import nn

from moe_peft.layers.allocation import at_least
from moe_peft.layers.task_routers import EmbeddingRouter
from moe_peft.methods.mixture import TaskMixture


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
