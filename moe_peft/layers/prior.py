"""The semantic prior of T-REX: a prompt's similarity to K clusters of training prompts (arXiv 2404.08985).

    s = C e          C [K, d] centroids, e [d] the prompt's embedding, s [K]

One vector per prompt, the same for all its tokens and all layers. The official code uses the raw dot product
(`norm: none`). Centroids are fitted by the `SemanticPriorFit` callback and live here, in persistent buffers: test,
predict and generate need no callback. Shapes: B rows, K clusters, d embedding width, N texts.
"""

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from moe_peft.batch import Batch
from moe_peft.embedders.base import Embedder, exact

if TYPE_CHECKING:
    from moe_peft.backbones import Backbone
    from moe_peft.context import RoutingContext


class SemanticPrior(nn.Module):
    """Similarity of every prompt to the fitted clusters.

    Args:
        embedder: turns a prompt into a vector; default: mean of the frozen input embeddings.
        clusters: K.
        norm: "none" is C e; "cosine" makes the centroids unit length; "softmax" is softmax(C e / temperature).
        temperature: of the softmax; must stay 1 for the other norms, which have none.
    """

    centroids: Tensor
    """[K, d] fp32."""
    fitted: Tensor
    """[] bool."""

    def __init__(
        self,
        embedder: Embedder | None = None,
        clusters: int = 32,
        norm: Literal["none", "cosine", "softmax"] = "none",
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        if clusters < 1:
            raise ValueError(f"clusters is {clusters}: a prior needs at least 1 cluster")
        if norm not in ("none", "cosine", "softmax"):
            raise ValueError(f"norm is {norm!r}: choose none, cosine or softmax")
        if temperature <= 0 or (norm != "softmax" and temperature != 1):
            raise ValueError(
                f"temperature is {temperature} with norm {norm!r}: give a positive one, with norm softmax only"
            )
        if embedder is None:
            from moe_peft.embedders import InputEmbeddings

            embedder = InputEmbeddings()
        self.embedder, self.clusters, self.norm, self.temperature = embedder, clusters, norm, temperature

    def bind(self, backbone: "Backbone", model: nn.Module, context: "RoutingContext") -> None:
        """Binds the embedder to the loaded model and creates the buffers; binding again keeps what was fitted."""
        self.embedder.bind(backbone, model, context)
        if "centroids" not in self._buffers:
            center = self.embedder.center
            self.register_buffer("centroids", center.new_zeros(self.clusters, center.shape[0]))
            self.register_buffer("fitted", torch.zeros_like(self.embedder.fitted))

    def forward(self, batch: Batch) -> Tensor:
        """Returns the prior [B, K] fp32 of the batch's prompts; answers, padding and batch mates do not enter.

        Raises:
            ValueError: no centroids were fitted or loaded.
        """
        if not self.fitted:
            raise ValueError("the semantic prior is not fitted: add the SemanticPriorFit callback or load a checkpoint")
        with exact(self.centroids.device):
            centroids = functional.normalize(self.centroids, dim=-1) if self.norm == "cosine" else self.centroids
            similarity = self.embedder(batch) @ centroids.T
            return torch.softmax(similarity / self.temperature, -1) if self.norm == "softmax" else similarity

    @torch.no_grad()
    def set_centroids(self, centroids: Tensor) -> None:
        """Stores fitted centroids [K, d].

        Raises:
            ValueError: another shape.
        """
        if centroids.shape != self.centroids.shape:
            given, wanted = tuple(centroids.shape), tuple(self.centroids.shape)
            raise ValueError(f"centroids have shape {given}, this prior's clusters x width is {wanted}: fit it again")
        self.centroids.copy_(centroids)
        self.fitted.fill_(True)

    @torch.no_grad()
    def assign(self, embeddings: Tensor) -> Tensor:
        """Returns the nearest centroid's id [N] int64 (Euclidean, as in K-means) of embeddings [N, d]."""
        exactly = "donot_use_mm_for_euclid_dist"
        return torch.cdist(embeddings.double(), self.centroids.double(), compute_mode=exactly).argmin(1)
