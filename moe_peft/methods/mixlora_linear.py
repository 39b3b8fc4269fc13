"""An approximation of MixLoRA (arXiv 2404.15159) that mixes the linears of an FFN, not its outputs.

    y = W0 x + (α / r) Σ_e g_e B_e A_e x in each linear of an FFN, with the one g of that FFN (see `mixlora`)

It is MixLoRA where a token uses one expert (`top_k: 1`); with more, W0's share of the activation is common to all. The
activation runs on one copy of the batch instead of k.
"""

from moe_peft.methods.ffn_mixture import FFNMixture


class MixLoRALinear(FFNMixture):
    """A sparse mixture of LoRAs with one routing for all linears of an FFN, LoRA in the attention.

    Args:
        mixture: the arguments of `FFNMixture`.
    """
