"""MixLoRA (arXiv 2404.15159): FFNs with LoRA in their linears as experts, k of them for every token.

    y = Σ_e g_e FFN_e(x),   FFN_e(x) = W2_e (act(W1_e x) · W3_e x),   W_e = W + (α / r) B_e A_e
    g = softmax over the k largest of W_g x

It does not fit a single linear: an FFN's output is mixed behind its activation. The forward is exact nevertheless, with
the model's own FFN and every base product made once (`layers.ffn_mixtures`). Attention has plain LoRA.

`balance` is 1 at uniform use of every FFN's experts; the official code joins the choices of all layers first, which
hides routers that collapsed onto different experts, and counts k times as much (its 0.001 at k = 2 is 0.002 here); the
paper has 0.01 and counts first choices only. The official variants (top-p, switch with capacity) are not built.
"""

from moe_peft.layers.ffn_mixtures import EntryLinear, ExitLinear
from moe_peft.methods.ffn_mixture import FFNMixture


class MixLoRA(FFNMixture):
    """A sparse mixture of FFNs, LoRA in the attention.

    Args:
        mixture: the arguments of `FFNMixture`.
    """

    entry, exit = EntryLinear, ExitLinear
