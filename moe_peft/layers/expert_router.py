"""Routers of TT-LoRA MoE: one expert per input, for all layers (arXiv 2504.21190; figure and official code).

    e = argmax z(f)          f: a feature of the frozen base for the row

A one-hot choice has no gradient, so a router learns from which expert a row belongs to and from nothing else. The
linear one, here, does so by gradient; the closed-form ones (see `closed_form_router`) by sums over rows.
Shapes: B rows, d features, E experts.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

DECAY = 1e-4
"""Of the fit of one row alone, which would grow without end where the new rows can be told apart."""


class ExpertRouter(nn.Module):
    """Base of all routers; a subclass gives `build`, `scores` and `add`, and says how it learns.

    Args:
        normalise: bring every feature vector to mean 0 and variance 1 first, so that one learning rate suits all
            backbones; the official code does not.
    """

    learns_by_gradient: ClassVar[bool] = False
    """Whether the scores' cross-entropy trains it; otherwise it has `observe`."""
    per_expert: ClassVar[tuple[str, ...]] = ()
    """Names of the tensors that hold one row per expert."""

    def __init__(self, normalise: bool = True) -> None:
        super().__init__()
        self.normalise = normalise

    def build(self, width: int, experts: int, device: torch.device | str | None = None) -> None:
        """Creates parameters and buffers.

        Args:
            width: d.
            experts: E.
            device: where.
        """
        raise NotImplementedError

    def scores(self, features: Tensor) -> Tensor:
        """Returns [B, E] of prepared features [B, d]; the largest one's expert serves the row."""
        raise NotImplementedError

    def observe(self, features: Tensor, experts: Tensor) -> None:
        """Takes a training batch into account, where nothing is learned by gradient.

        Args:
            features: [B, d].
            experts: [B], which expert each row belongs to.
        """
        raise NotImplementedError

    def rows_to_add(self) -> int:
        """Returns how many rows of every expert `add` can make use of."""
        raise NotImplementedError

    def add(self, new: int, features: Tensor, experts: Tensor) -> None:
        """Learns one more expert, whose rows are still zero.

        Args:
            new: the expert.
            features: [n, d], of rows of all experts.
            experts: [n], which expert each belongs to.
        """
        raise NotImplementedError

    def confidence(self, scores: Tensor) -> Tensor:
        """Returns [B], how sure the router is that a row belongs to any expert, from its scores [B, E].

        How far the best score stands above the mean: what lifts or lowers all alike says nothing of a row's expert.
        """
        known = scores.masked_fill(scores.isneginf(), float("nan"))  # an expert of which no row was seen has no score
        return scores.amax(-1) - known.nanmean(-1)

    @torch.no_grad()
    def weights(self, scores: Tensor, chosen: Tensor, refusing: bool) -> Tensor:
        """Returns a record of the routing [B, E], or [B, E + 1] where rows may be refused: the last is nobody.

        A router that learns by gradient knows probabilities; the scores of others are none, so their choice counts.

        Args:
            scores: [B, E].
            chosen: [B], -1 for a refused row.
            refusing: whether rows may be.
        """
        experts, refused = scores.shape[1], chosen < 0
        weights = functional.one_hot(chosen.masked_fill(refused, experts), experts + 1).to(scores.dtype)
        if self.learns_by_gradient:
            known = functional.pad(scores.softmax(-1), (0, 1))
            weights = torch.where(refused.unsqueeze(1), weights, known)
        return weights if refusing else weights[:, :experts]

    def forward(self, features: Tensor) -> Tensor:
        """Returns scores [B, E] of features [B, d], in fp32 also under autocast."""
        with torch.autocast(features.device.type, enabled=False):
            return self.scores(self.prepare(features))

    def prepare(self, features: Tensor) -> Tensor:
        """Returns features [B, d] in fp32, normalised where asked."""
        features = features.float()
        return functional.layer_norm(features, features.shape[-1:]) if self.normalise else features


class LinearRouter(ExpertRouter):
    """A linear map, trained by gradient; its scores are noisy in training.

        z = W f,   z~ = z + ε softplus(V f + c),   ε ~ N(0, 1)

    The official code adds its noise at test time too, and reads it from the mean over all positions.

    Args:
        normalise: see `ExpertRouter`.
        noise: add the learned noise while training.
    """

    learns_by_gradient = True
    per_expert = ("gate.weight", "noise.weight", "noise.bias")

    def __init__(self, normalise: bool = True, noise: bool = True) -> None:
        super().__init__(normalise)
        self.noisy = noise
        self.noise: nn.Linear | None = None

    def build(self, width: int, experts: int, device: torch.device | str | None = None) -> None:
        """Draws both linears."""
        self.gate = nn.Linear(width, experts, bias=False, device=device, dtype=torch.float32)
        self.noise = nn.Linear(width, experts, device=device, dtype=torch.float32) if self.noisy else None

    def scores(self, features: Tensor) -> Tensor:
        """Returns z, or z~ in training."""
        scores = self.gate(features)
        if self.training and self.noise is not None:
            scores = scores + torch.randn_like(scores) * functional.softplus(self.noise(features))
        return scores

    def rows_to_add(self) -> int:
        """300 of each expert, fewer where there are very many."""
        return max(10, min(300, 30_000 // self.gate.out_features))

    @torch.inference_mode(False)  # else nothing could be fitted there
    def add(self, new: int, features: Tensor, experts: Tensor) -> None:
        """Fits the new expert's row of W to the cross-entropy of all rows, in fp64; every other row stays as it is.

        The rows of the old experts teach the new one what to leave alone. Of their scores only the log-sum-exp r
        matters: the cross-entropy is that of a logistic regression with logits z_new - r, which is convex.
        """
        prepared = self.prepare(features.detach()).double()
        others = prepared @ self.gate.weight.detach().double().T
        others[:, new] = float("-inf")
        rest, own = others.logsumexp(-1), (experts == new).double()
        row = prepared.new_zeros(prepared.shape[1], requires_grad=True)
        solver = torch.optim.LBFGS([row], max_iter=300, history_size=20, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            solver.zero_grad()
            value = functional.binary_cross_entropy_with_logits(prepared @ row - rest, own)
            value = value + DECAY * row.square().sum()
            value.backward()
            return value

        solver.step(loss)  # pyright: ignore[reportArgumentType]
        with torch.no_grad():
            self.gate.weight[new] = row.float()
