#!/usr/bin/env python
"""Exports a trained task as an ordinary LoRA (PEFT's files), as a plain merged model or as an expert of its own.

    python tools/export.py runs/X --to peft --task sst2 --out exports/sst2
    python tools/export.py runs/X --to merged --task all --out exports/X
    python tools/export.py runs/X --to expert --task all --out experts

What was written is read back, and the largest difference of its logits from the trained module's is printed. The
status is 1 where it is more than the backbone's dtype explains; the files stay. Experts (of TTLoRA and TTLoRAMoE, for
FreezeThenRoute's expert_paths) must be equal to the bit.
"""

import argparse
import os
import sys
from pathlib import Path


def arguments() -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "checkpoint", metavar="RUN_OR_CHECKPOINT", help="a run's folder (its best checkpoint), or a file"
    )
    parser.add_argument("--to", choices=["peft", "merged", "expert"], required=True, help="what to write")
    parser.add_argument("--task", required=True, help="the task's name; all: every task, in a sub-folder each")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must not exist, or be empty")
    parser.add_argument("--uniform-rank", action="store_true", help="peft: one rank for all linears, padded with zeros")
    parser.add_argument("--backbone", help="where the backbone's files lie, if not where they lay in training")
    parser.add_argument("--text", action="append", help="a text to compare on (repeatable); default: random token ids")
    return parser.parse_args()


def main() -> None:
    """Exports and prints the parity; a difference too large ends in status 1, a user's mistake in status 2."""
    given = arguments()

    from moe_peft.cli import quiet
    from moe_peft.interop.export import export, unfaithful
    from moe_peft.messages import one_line
    from moe_peft.runs import load_module

    quiet()
    try:
        module = load_module(given.checkpoint, given.backbone)
        exports = export(module, given.to, given.task, given.out, given.uniform_rank, given.text)
    except (ValueError, OSError) as error:
        if os.environ.get("MOE_PEFT_TRACEBACK"):
            raise
        print(f"error: {one_line(str(error))}", file=sys.stderr)
        sys.exit(2)
    for each in exports:
        print(each)
    fault = unfaithful(exports)
    if fault is not None:
        print(f"error: {fault}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
