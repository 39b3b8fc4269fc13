"""X-LoRA (arXiv 2402.07148): LoRA experts in every linear, weighed by one classifier of the frozen base's own states.

    y = W0 x + (α / r) Σ_e g_e B_e A_e x,   g = softmax(f(h) / τ),   h the base's last hidden state at the token

h comes from a first pass with the adapters off. Its price: a step costs three forwards of the base instead of two (no
weight of the base has a gradient), scoring and a prefill two instead of one. A decoding step costs nothing more, for
tokens after the prompt take the weights of the prompt's last one, in training as in generation; the official code makes
its first pass anew for every written token, and knows no cache. Its experts were trained before and are frozen
(`train_experts: false`); here they learn along with the classifier.
"""

from typing import Any

import torch
from torch import Tensor, nn

from moe_peft.batch import Batch
from moe_peft.layers.adapted import AdaptedLinear
from moe_peft.layers.allocation import at_least
from moe_peft.layers.given import WEIGHTS, GivenRouter, sees_answers
from moe_peft.methods.mixture import Mixture
from moe_peft.methods.scoring import base_states


class ExpertClassifier(nn.Module):
    """The map from hidden states to weights of experts.

    Args:
        width: d of the states.
        experts: E.
        layers: L linears with weights of their own; None: all have the same.
        depth: linear maps, with a ReLU between each two.
        inner: width between them.
        dropout: after each ReLU.
        temperature: τ.
        top_k: keep so many of the weights of each token, as they are; None keeps all.
        device: where to create the parameters.
    """

    def __init__(
        self,
        width: int,
        experts: int,
        layers: int | None,
        depth: int,
        inner: int,
        dropout: float,
        temperature: float,
        top_k: int | None,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.shape = (experts,) if layers is None else (layers, experts)
        self.temperature, self.top_k = temperature, top_k
        sizes, parts = [width, *[inner] * (depth - 1), experts * (layers or 1)], []
        for before, after in zip(sizes[:-1], sizes[1:], strict=True):
            parts += [nn.Linear(before, after, device=device, dtype=torch.float32), nn.ReLU(), nn.Dropout(dropout)]
        self.layers = nn.Sequential(*parts[:-2])

    def forward(self, states: Tensor) -> Tensor:
        """Returns the weights [B, S, E] or [B, S, L, E] of states [B, S, d], in fp32 also under autocast."""
        with torch.autocast(states.device.type, enabled=False):
            scores = self.layers(states.to(next(self.parameters()).dtype)).unflatten(-1, self.shape)
            g = (scores / self.temperature).softmax(-1)
        if self.top_k is None:
            return g
        kept = g.topk(min(self.top_k, g.shape[-1]), -1)
        return torch.zeros_like(g).scatter(-1, kept.indices, kept.values)


class XLoRA(Mixture):
    """LoRA experts under one classifier that has read the text before.

    Args:
        experts: E.
        layerwise: every linear has weights of its own, of the same classifier.
        top_k: keep so many experts per token, with the weights that they have; null keeps all.
        depth: of the classifier; 1 is a linear map.
        width: of the classifier between its linear maps.
        classifier_dropout: in the classifier, after each of them but the last.
        temperature: τ.
        train_experts: false leaves the experts as they are, for those of other runs.
        mixture: the arguments of `Mixture`.
    """

    as_lora = {"experts": 1}

    def __init__(
        self,
        experts: int = 8,
        layerwise: bool = False,
        top_k: int | None = None,
        depth: int = 1,
        width: int = 2048,
        classifier_dropout: float = 0.2,
        temperature: float = 1.0,
        train_experts: bool = True,
        **mixture: Any,
    ) -> None:
        super().__init__(experts=experts, **mixture)
        if not isinstance(experts, int):
            raise ValueError(f"experts: {experts} differ by layer, and one classifier weighs them all; give one number")
        for name, value in (("depth", depth), ("width", width), ("top_k", 1 if top_k is None else top_k)):
            at_least(name, value, 1)
        if temperature <= 0:
            raise ValueError(f"temperature: {temperature} divides the scores; give more than 0")
        self.layerwise, self.top_k, self.depth, self.width = layerwise, top_k, depth, width
        self.classifier_dropout, self.temperature, self.train_experts = classifier_dropout, temperature, train_experts
        self.classifier: ExpertClassifier | None = None

    def assemble(self) -> None:
        """Builds as every method, then the classifier of all linears."""
        super().assemble()
        assert isinstance(self.experts, int)
        layers = len(self.adapted) if self.layerwise else None
        device = next(self.built().parameters()).device
        self.classifier = ExpertClassifier(
            self.backbone.hidden_size,
            self.experts,
            layers,
            self.depth,
            self.width,
            self.classifier_dropout,
            self.temperature,
            self.top_k,
            device,
        )
        self.classifier.train(self.training)
        for at, layer in enumerate(self.adapted.values()):
            assert isinstance(layer.router, GivenRouter)
            layer.router.layer = at if self.layerwise else None

    def adapt(self, base: nn.Linear, slot: str) -> AdaptedLinear:
        """Stacked experts, frozen where asked, whose weights come with the batch."""
        layer = super().adapt(base, slot)
        layer.factors.requires_grad_(self.train_experts)
        assert isinstance(layer.router, GivenRouter)
        layer.router.answers = sees_answers(slot, self.backbone.kind == "seq2seq")
        return layer

    def router(self, base: nn.Linear, experts: int, rank: int) -> GivenRouter:
        """Takes what the classifier said."""
        return GivenRouter(rank)

    def routing_facts(self, batch: Batch) -> dict[str, Tensor]:
        """Adds every token's weights, from a pass of the base."""
        facts = super().routing_facts(batch)
        if not self.context.enabled:
            return facts
        assert self.classifier is not None
        states = base_states(self.backbone, self.built(), self.context, batch)
        g = self.classifier(states)
        prompt = batch.get("prompt_mask", batch["attention_mask"]).bool()
        last = (prompt * torch.arange(prompt.shape[1], device=prompt.device)).argmax(1)
        held = g[torch.arange(len(g), device=g.device), last].unsqueeze(1)
        mask = prompt.view(*prompt.shape, *(1,) * (g.dim() - 2))
        return facts | {WEIGHTS: torch.cat([torch.where(mask, g, held), held], 1)}
