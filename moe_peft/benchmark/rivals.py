"""What ours is compared with, on the same linears: eager LoRA, Hugging Face PEFT's, loops over experts, no adapter.

Shapes: B rows, S tokens, D in, O out, R rank, E experts.
"""

import importlib.util
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from moe_peft.benchmark.figures import Product
from moe_peft.benchmark.setting import DTYPES, Setting, draw
from moe_peft.benchmark.variants import Subject, Turns, dense, low_rank, tensor_train, update

HAS_PEFT = importlib.util.find_spec("peft") is not None


def bare(setting: Setting, name: str) -> Subject:
    """The frozen base alone."""
    base = setting.linear()
    return Subject(name, base, base, torch.zeros_like, {}, [])


def eager_lora(setting: Setting, rank: int, name: str) -> Subject:
    """LoRA as one writes it in three lines of torch; without gradients, its factors are in the base's dtype already."""
    factors, base = dense(setting, rank, rank, torch.Generator().manual_seed(2)), setting.linear()
    a, b, dtype = factors.A, factors.B, DTYPES[setting.dtype]
    used = (a, b) if setting.training else (a.detach().to(dtype), b.detach().to(dtype))

    def forward(x: Tensor) -> Tensor:
        return base(x) + 2.0 * linear(linear(x, used[0].to(dtype)), used[1].to(dtype))

    def plain(x: Tensor) -> Tensor:
        return update(x, a, b, scale=2.0)

    return Subject(name, base, forward, plain, {"A": a, "B": b}, low_rank(setting, rank, rank))


def peft_lora(setting: Setting, rank: int, name: str) -> Subject:
    """Hugging Face PEFT's linear, its adapters in fp32 whatever the base's dtype, as its own default is."""
    from peft import LoraConfig
    from peft.tuners.lora import Linear

    base, generator = setting.linear(), torch.Generator().manual_seed(2)
    config = LoraConfig(r=rank, lora_alpha=2 * rank)
    layer: Any = Linear(base, "default", config=config, r=rank, lora_alpha=2 * rank)
    a, b = layer.lora_A["default"].float().weight, layer.lora_B["default"].float().weight
    draw(a, setting.width**-0.5, generator)
    draw(b, rank**-0.5, generator)
    layer.train(setting.training)

    def plain(x: Tensor) -> Tensor:
        return update(x, a, b, scale=2.0)

    return Subject(name, base, layer, plain, {"A": a, "B": b}, low_rank(setting, rank, rank))


def trex_loop(setting: Setting, r1: int, r2: int, name: str) -> Subject:
    """T-REX, one pair of experts after the other, each weighted by its column of the router's output."""
    generator, base, dtype = torch.Generator().manual_seed(3), setting.linear(), DTYPES[setting.dtype]
    router = draw(torch.empty(r1 * r2, setting.width, device=setting.device), setting.width**-0.5, generator)
    router = nn.Parameter(router)
    factors = dense(setting, r1, r2, generator)

    def forward(x: Tensor) -> Tensor:
        g, y = linear(x, router.to(dtype)).float().softmax(-1).to(dtype), base(x)
        a, b = factors.A.to(dtype), factors.B.to(dtype)
        for pair in range(r1 * r2):
            i, j = divmod(pair, r2)
            y = y + g[..., pair, None] * linear(linear(x, a[i : i + 1]), b[:, j : j + 1])
        return y

    def plain(x: Tensor) -> Tensor:
        g = torch.einsum("bsd,ed->bse", x, router.double()).softmax(-1)
        return update(x, factors.A, factors.B, g.unflatten(-1, (r1, r2)))

    weights, count, width = {"A": factors.A, "B": factors.B, "router": router}, setting.count, setting.width
    products = [
        Product("W_r x", count, width, r1 * r2, 2),
        *(Product("a x", count, width, 1, 2), Product("b h", count, 1, width, 2)) * (r1 * r2),
    ]
    return Subject(name, base, forward, plain, weights, products, r1 * r2)


def experts_loop(setting: Setting, rank: int, experts: int, name: str) -> Subject:
    """Frozen experts of dense factors, one after the other, each on its own rows."""
    base, turns, dtype = setting.linear(), Turns(setting, experts), DTYPES[setting.dtype]
    bank = tensor_train(setting, rank, experts, torch.Generator().manual_seed(6))
    with torch.no_grad():
        stacked = bank(torch.arange(experts, device=setting.device))
    a, b = (part.to(dtype).contiguous() for part in stacked)

    def forward(x: Tensor) -> Tensor:
        chosen, y = turns.batches[turns.next()], base(x)
        y = y.clone()
        for expert in chosen.unique().tolist():
            rows = (chosen == expert).nonzero().squeeze(1)
            y = y.index_add(0, rows, linear(linear(x[rows], a[expert]), b[expert]))
        return y

    def plain(x: Tensor) -> Tensor:
        parts = (part.index_select(0, turns.current).double() for part in stacked)
        return torch.einsum("bsd,brd,bor->bso", x, *parts)

    products = low_rank(setting, rank, rank, frozen=True)
    return Subject(name, base, forward, plain, {}, products, experts, [a, b])
