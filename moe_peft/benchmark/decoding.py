"""Generation with a cache of keys and values: the time of one token after the prompt, for every method."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from moe_peft.backbones import Backbone
from moe_peft.batch import Batch
from moe_peft.benchmark.models import METHODS, OWN, PEFT, RANK, build, factors_of, random_batch, sharing
from moe_peft.benchmark.rivals import HAS_PEFT
from moe_peft.benchmark.timing import Variant, clock_of, interleave, summary
from moe_peft.layers.injection import find_linears
from moe_peft.methods.base import MultitaskModule
from moe_peft.quirks import CACHE

BARE, EAGER, MERGED = "bare base", f"eager LoRA r={RANK}", f"{OWN}, merged"
TOKENS = 8
"""Decoded per call, after the same prompt each time."""
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 1e-1}
"""Largest accepted difference of two logits of the same model, relative to the largest."""


class EagerLoRA(nn.Module):
    """LoRA as one writes it in three lines of torch, its factors in the base's dtype.

    Args:
        base: a frozen linear.
        a: A [R, D].
        b: B [O, R].
    """

    def __init__(self, base: nn.Linear, a: Tensor, b: Tensor) -> None:
        super().__init__()
        self.base = base
        self.a, self.b = (nn.Parameter(part.detach().to(base.weight.dtype), requires_grad=False) for part in (a, b))

    def forward(self, x: Tensor) -> Tensor:
        """Returns base(x) + 2 B A x."""
        return self.base(x) + 2.0 * linear(linear(x, self.a), self.b)


class Decoder(NamedTuple):
    """One way to generate."""

    name: str
    model: Any
    begin: Callable[[], Any]
    """Publishes the prompts' facts, where there are any."""

    def prefill(self, ids: Tensor) -> Any:
        """Returns the cache after the prompts [B, S]."""
        self.begin()
        return self.model(input_ids=ids, use_cache=True)[CACHE]

    def decode(self, cache: Any, last: Tensor) -> list[Tensor]:
        """Decodes greedily from the last prompt token [B, 1] on; leaves the cache as it was. Returns the logits."""
        logits = []
        for _ in range(TOKENS):
            logits.append(self.model(input_ids=last, use_cache=True, **{CACHE: cache}).logits[:, -1])
            last = logits[-1].argmax(-1, keepdim=True)
        cache.crop(-TOKENS)
        return logits


@torch.no_grad()
def decoding_section(backbone: Backbone, rows: int, tokens: int, rounds: int, device: str) -> list[dict[str, Any]]:
    """Times a decoded token of everything.

    Args:
        backbone: the frozen model.
        rows: prompts decoded at once.
        tokens: of a prompt.
        rounds: calls of each.
        device: where.

    Raises:
        RuntimeError: adapters that do nothing, or logits that differ where they must not.
    """
    model = backbone.load().to(device)
    batch = random_batch(backbone.config().vocab_size, rows, tokens, device)
    last = batch["input_ids"][:, :1]
    everyone = decoders(sharing(backbone, model), batch)
    check(everyone, batch["input_ids"], last, backbone.dtype)
    variants = []
    for one in everyone:
        cache = one.prefill(batch["input_ids"])
        variants.append(Variant(one.name, partial(one.decode, cache, last)))
    times = summary(interleave(variants, rounds, clock_of(device), warm_up=1))
    setting = {"job": "decoded token", "rows": rows, "tokens": tokens, "dtype": str(backbone.dtype).split(".")[-1]}
    found = []
    for name, own in times.items():
        each = {key: own[key] / TOKENS for key in ("min_us", "median_us")}
        found.append({**setting, "variant": name, **each, "ratio_to": own["ratio_to"]})
    return found


def decoders(backbone: Backbone, batch: Batch) -> list[Decoder]:
    """Sets everything up, on the weights of one model."""
    modules = {name: build(backbone, name).eval() for name in METHODS}
    factors = factors_of(modules[OWN])
    everyone = [Decoder(BARE, backbone.load(), lambda: None), Decoder(EAGER, eager(backbone.load(), factors), _nothing)]
    everyone += [ours(name, module, batch) for name, module in modules.items()]
    merged = build(backbone, OWN).eval()
    merged.merge()
    everyone.append(ours(MERGED, merged, batch))
    if HAS_PEFT:
        everyone.append(Decoder(PEFT, peft(backbone.load(), factors), _nothing))
    return everyone


def _nothing() -> None:
    pass


def ours(name: str, module: MultitaskModule, batch: Batch) -> Decoder:
    """One of our methods."""
    return Decoder(name, module.built(), partial(module.begin, batch))


def eager(model: nn.Module, factors: dict[str, tuple[Tensor, Tensor]]) -> nn.Module:
    """Puts eager LoRAs into all linears."""
    for slot in find_linears(model, "all-linear"):
        parent, _, leaf = slot.rpartition(".")
        base = model.get_submodule(slot)
        assert isinstance(base, nn.Linear)
        setattr(model.get_submodule(parent), leaf, EagerLoRA(base, *factors[slot]))
    return model


def peft(model: nn.Module, factors: dict[str, tuple[Tensor, Tensor]]) -> nn.Module:
    """Puts PEFT's LoRAs into all linears, its adapters as its default stores them."""
    from moe_peft.comparison.peft_script import AS_USED, PeftScript

    script = PeftScript(model, AS_USED, RANK, iter([]), 0.0, 0.0)
    script.start_as(factors)
    return script.model.eval()


def check(everyone: list[Decoder], ids: Tensor, last: Tensor, dtype: torch.dtype) -> None:
    """Holds the first decoded logits against those of a forward over the whole, and all LoRAs against each other.

    Raises:
        RuntimeError: they differ; or adapters that do not move them.
    """
    first = {}
    for one in everyone:
        first[one.name] = one.decode(one.prefill(ids), last)[0].float()
        whole = one.model(input_ids=torch.cat([ids, last], 1), use_cache=False).logits[:, -1].float()
        _refuse(one.name, first[one.name], whole, dtype)
        if one.name != BARE and (first[one.name] - first[BARE]).abs().max() < 1e-3:
            raise RuntimeError(f"{one.name}: the adapters do not move the logits")
    for name in {EAGER, MERGED, PEFT} & first.keys():
        _refuse(name, first[name], first[OWN], dtype)


def _refuse(name: str, found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    difference = ((found - expected).abs().max() / expected.abs().max()).item()
    if not difference < TOLERANCE[dtype]:
        raise RuntimeError(f"{name}: logits differ by {difference:.1e} of the largest")
