"""The router of TT-LoRA MoE: one expert per input, for all layers (arXiv 2504.21190; figure and official code).

    z = W f,   z~ = z + ε softplus(V f + c),   ε ~ N(0, 1) while training only
    e = argmax z~

f is a feature of the frozen base, so the router learns from the cross-entropy with the row's own expert alone: a
one-hot choice has no gradient. The official code adds its noise at test time too.
Shapes: B rows, d features, E experts.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional


class ExpertRouter(nn.Module):
    """Scores every expert for every row.

    Args:
        width: d.
        experts: E.
        normalise: bring every feature vector to mean 0 and variance 1 first, so that one learning rate suits all
            backbones; the official code does not.
        noise: add the learned noise while training.
        device: where to create the parameters.
    """

    def __init__(
        self,
        width: int,
        experts: int,
        normalise: bool = True,
        noise: bool = True,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.normalise = normalise
        self.gate = nn.Linear(width, experts, bias=False, device=device, dtype=torch.float32)
        self.noise = nn.Linear(width, experts, device=device, dtype=torch.float32) if noise else None

    def forward(self, features: Tensor) -> Tensor:
        """Returns scores [B, E] of features [B, d], in fp32 also under autocast; noisy in training."""
        with torch.autocast(features.device.type, enabled=False):
            features = features.float()
            if self.normalise:
                features = functional.layer_norm(features, features.shape[-1:])
            scores = self.gate(features)
            if self.training and self.noise is not None:
                scores = scores + torch.randn_like(scores) * functional.softplus(self.noise(features))
            return scores
