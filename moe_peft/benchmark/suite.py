"""What the benchmark compares on one linear: by section, the variants and what they are held against."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from moe_peft.benchmark import rivals, variants
from moe_peft.benchmark.adapters import AdapterBench, Build
from moe_peft.benchmark.setting import DTYPES, Setting

LORA, TREX, MOR1E, MORE = "LoRA r=8", "T-REX 4x8", "MoR1E E=8", "MoRE r=8"
TT_LORA, TT_17, TT_1000 = "TT-LoRA r=5", "TT-LoRA MoE, 17 frozen", "TT-LoRA MoE, 1,000 frozen"
OURS = (LORA, TREX, MOR1E, MORE, TT_LORA, TT_17, TT_1000)
EAGER_22, EAGER_8, EAGER_5 = "eager LoRA r=22", "eager LoRA r=8", "eager LoRA r=5"
PEFT, TREX_LOOP, EXPERTS_LOOP = "HF PEFT LoRA r=8", "T-REX 4x8, a loop", "17 frozen experts, a loop"
BARE, MERGED_MORE, MERGED_TT = "bare base", "MoRE merged", "TT-LoRA merged"
EXPERTS = (1, 4, 17, 64, 256, 1024)
PAIRS = ((2, 2), (2, 4), (4, 4), (4, 8), (8, 8))
TASKS = (1, 8, 64, 1024)


def ours() -> list[Build]:
    """Returns our methods, as DESIGN's targets name them."""
    return [
        partial(variants.lora, rank=8, name=LORA),
        partial(variants.trex, r1=4, r2=8, rank1=False, name=TREX),
        partial(variants.trex, r1=8, r2=8, rank1=True, name=MOR1E),
        partial(variants.more, rank=8, tasks=8, name=MORE),
        partial(variants.tt_lora, rank=5, name=TT_LORA),
        partial(variants.tt_experts, rank=5, experts=17, name=TT_17),
        partial(variants.tt_experts, rank=5, experts=1000, name=TT_1000),
    ]


def references() -> list[Build]:
    """Returns plain eager LoRA of equal parameters or rank."""
    names = {22: EAGER_22, 8: EAGER_8, 5: EAGER_5}
    return [partial(rivals.eager_lora, rank=rank, name=name) for rank, name in names.items()]


def others(loops: bool = True) -> list[Build]:
    """Returns points of comparison: Hugging Face PEFT where it is installed, and loops over experts."""
    found: list[Build] = [partial(rivals.peft_lora, rank=8, name=PEFT)] if rivals.HAS_PEFT else []
    if loops:
        found.append(partial(rivals.trex_loop, r1=4, r2=8, name=TREX_LOOP))
        found.append(partial(rivals.experts_loop, rank=5, experts=17, name=EXPERTS_LOOP))
    return found


def merged() -> list[Build]:
    """Returns what serves one task at the base's own cost, and the base."""
    return [
        partial(rivals.bare, name=BARE),
        partial(variants.more, rank=8, tasks=8, name=MERGED_MORE, merge=True),
        partial(variants.tt_lora, rank=5, name=MERGED_TT, merge=True),
    ]


def growth() -> list[Build]:
    """Returns our methods at growing numbers of experts or tasks, and eager LoRA of equal parameters for T-REX."""
    builds: list[Build] = [
        partial(variants.tt_experts, rank=5, experts=n, name=grown("TT-LoRA MoE", n)) for n in EXPERTS
    ]
    for r1, r2 in PAIRS:
        builds.append(partial(variants.trex, r1=r1, r2=r2, rank1=False, name=grown("T-REX", r1 * r2)))
        rank = (r1 + r2 + r1 * r2) // 2
        builds.append(partial(rivals.eager_lora, rank=rank, name=grown("eager LoRA of T-REX's size", r1 * r2)))
    builds += [partial(variants.more, rank=8, tasks=n, name=grown("MoRE", n)) for n in TASKS]
    return [*builds, *references()[1:]]


def grown(method: str, count: int) -> str:
    """Names a method at a number of experts (pairs, tasks)."""
    return f"{method} @ {count:,}"


def growth_of(name: str) -> tuple[str, int]:
    """Returns the method and number that a name of `grown` has; 0 where it has none."""
    method, _, count = name.partition(" @ ")
    return method, int(count.replace(",", "") or 0)


def adapter_section(sizes: Setting, widths: Sequence[int], dtypes: Sequence[str], rounds: int) -> list[dict[str, Any]]:
    """Measures everything at every width and dtype: alone and with the base, with and without gradients.

    Args:
        sizes: rows, tokens and device.
        widths: D.
        dtypes: of the base.
        rounds: calls of every variant; 0 counts only.
    """
    rows = []
    for width in widths:
        for dtype in dtypes:
            for training, base in ((True, False), (False, False), (True, True), (False, True)):
                builds = [*references(), *ours(), *others(loops=not base)]
                builds += merged() if base and not training else [partial(rivals.bare, name=BARE)] if base else []
                setting = sizes._replace(width=width, dtype=dtype, training=training, base=base)
                rows += AdapterBench(setting, builds).measure(rounds)
    return rows


def growth_section(sizes: Setting, width: int, dtype: str, rounds: int) -> list[dict[str, Any]]:
    """Measures growth at one width and dtype, with and without gradients (see `adapter_section`)."""
    rows = []
    for training in (True, False):
        setting = sizes._replace(width=width, dtype=dtype, training=training, base=False)
        rows += AdapterBench(setting, growth()).measure(rounds)
    return rows


def stable_figures() -> list[dict[str, Any]]:
    """Returns what must not change from machine to machine, of a small linear: what the committed table holds."""
    rows = []
    for dtype in DTYPES:
        for training in (True, False):
            bench = AdapterBench(Setting(64, 4, 8, dtype, training), [*references(), *ours()])
            rows += bench.measure(rounds=0)
    return rows
