"""The gated low-rank update on a GPU: Triton kernels behind the functions of `moe_peft.kernels.eager`.

`shrink_gate` reads x once and leaves only rank space, `backward_y` reads dY once; `backward_x` and `backward_w` are
kernels where there is dropout, whose mask they draw again from its seed, and otherwise torch's products, which move the
same bytes. Nothing uses atomics and no sum's order depends on a timing, so that the same call gives the same bits.

Rank space lies tokens first here: z [M, R + E], as tiles of tokens are loaded. Importing this imports triton.
"""

from torch import Tensor

from moe_peft.kernels import eager
from moe_peft.kernels.gpu.backward_input import backward_w, backward_x
from moe_peft.kernels.gpu.backward_output import backward_y
from moe_peft.kernels.gpu.dropout import draw
from moe_peft.kernels.gpu.forward import shrink_gate
from moe_peft.kernels.gpu.gates import fits


def expand_(y: Tensor, o: Tensor, bt: Tensor, scale: float) -> Tensor:
    """Adds scale * o Bᵀ to y in place: torch's product, which adds as it stores."""
    return eager.expand_(y, o.mT, bt, scale)


__all__ = ["backward_w", "backward_x", "backward_y", "draw", "expand_", "fits", "shrink_gate"]
