"""Compares whole training steps with those of a plain transformers + Hugging Face PEFT script, on the same batches.

    python tools/compare_peft.py

First, on a float32 base, the losses of our LoRA must equal the script's step by step (else status 1). Then all methods
and the script take turns on a bfloat16 base; the table shows medians, and ratios of CPU times. The script comes in
four forms: adapters in fp32 (PEFT's default) or bf16, logits of all tokens (`labels=`) or of the answers alone.

Base and data are SmolLM2-135M and the quickstart's tasks; `--config FILE ...`, `--data.root FOLDER` and the like say
otherwise, as for `python -m moe_peft fit`. Each side has its own attention: ours what the quickstart sets, the script
what transformers takes by itself. Needs peft.
"""

import argparse
from typing import Any

from rich.console import Console

from moe_peft.comparison.command import Parser, base_of, run
from moe_peft.comparison.steps import METHODS, compare_losses, compare_times, ratios, table
from moe_peft.data.module import MultitaskDataModule


def parser() -> Parser:
    """Returns the command line."""
    result = Parser(__doc__, dtype="bf16")
    result.add_number("--steps", 10, 0, "steps with equal losses; 0 leaves them out")
    result.add_number("--rounds", 8, 0, "timed steps of each; 0 leaves them out")
    result.add_argument("--methods", default=",".join(METHODS), help="LoRA is always among them (%(default)s)")
    result.add_argument(
        "--peft_attention", choices=("sdpa", "eager"), default="sdpa", help="the script's (%(default)s)"
    )
    return result


def compare(given: argparse.Namespace, data: MultitaskDataModule) -> dict[str, Any]:
    """Compares losses, then times."""
    found: dict[str, Any] = {}
    names = given.methods.split(",")
    unknown = [name for name in names if name not in METHODS]
    if unknown:
        raise ValueError(f"methods: there is no {unknown[0]!r}; use {', '.join(METHODS)}")
    if given.steps:
        bases = [base_of(data, "fp32", attention) for attention in (given.attention, given.peft_attention)]
        losses = compare_losses(data, *bases, steps=given.steps, threads=given.threads)
        worst = max(max(step) - min(step) for step in zip(*losses.values(), strict=True))
        print(f"{given.steps} steps on a float32 base: the losses of {', '.join(losses)} agree to {worst:.1e}")
        found["losses"] = losses
    if given.rounds:
        bases = [base_of(data, given.dtype, attention) for attention in (given.attention, given.peft_attention)]
        records = compare_times(data, *bases, names=names, rounds=given.rounds, threads=given.threads)
        title = f"whole step, CPU, threads: {given.threads}, {given.dtype} base, {data.batch_size} rows"
        Console().print(table(records, f"{title}, attention: ours {given.attention}, PEFT's {given.peft_attention}"))
        found |= {"times": {name: record._asdict() for name, record in records.items()}, "ratios": ratios(records)}
    return found


if __name__ == "__main__":
    run(parser(), compare, needs=("peft",))
