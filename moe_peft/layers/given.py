"""A router that decides nothing: weights of E experts come token by token with the batch.

The method publishes them as a fact [B, S + 1, E], or [B, S + 1, L, E]: one for each token of the batch, the last for
every token after them, which is what a decoding step sees, and a decoder that has an encoder.
Shapes: B batch, S sequence, E experts, L adapted linears.
"""

from torch import Tensor

from moe_peft.batch import CROSS_KEYS
from moe_peft.context import Routing, RoutingContext
from moe_peft.kernels.reference import Gate
from moe_peft.layers.mixtures import MixtureRouter

WEIGHTS = "weights"
"""The fact."""


class GivenRouter(MixtureRouter):
    """Weighs stacked experts by what the batch says.

    Args:
        rank: r of every expert.
        answers: whether this linear sees an answer's tokens alone, as an encoder-decoder's decoder does.
        layer: which of the L linears' weights to take; None where all have the same.
    """

    def __init__(self, rank: int, answers: bool = False, layer: int | None = None) -> None:
        super().__init__("block", rank)
        self.answers, self.layer = answers, layer

    def gate(self, x: Tensor, context: RoutingContext, slot: str) -> Gate:
        """Returns the weights of every token.

        Raises:
            ValueError: the batch came without any.
        """
        if self.answers:
            fact = context.get(WEIGHTS, len(x))
            g = None if fact is None else fact[:, -1:]
        else:
            g = context.get_tokens(WEIGHTS, len(x), x.shape[1])
        if g is None:
            raise ValueError(f"{slot} was given no weights for these rows: go through the module's forward")
        g = g if self.layer is None else g[:, :, self.layer]
        context.record(slot, Routing(g.detach()))
        return Gate("block", beta=g)

    def forward(self, x: Tensor, h: Tensor, scores: Tensor | None, context: RoutingContext, slot: str) -> Tensor:
        """Returns the core of every token."""
        g = self.gate(x, context, slot).beta
        assert g is not None
        return g.repeat_interleave(self.rank, -1)


def sees_answers(slot: str, seq2seq: bool) -> bool:
    """Whether a linear sees the tokens of answers alone: in the decoder of an encoder-decoder, but for cross-attention.

    Args:
        slot: its name in the model.
        seq2seq: whether the model is an encoder-decoder.
    """
    return seq2seq and ".decoder." in f".{slot}" and not CROSS_KEYS.fullmatch(slot)
