#!/usr/bin/env python
"""Exports a trained task as a LoRA (PEFT's files), a plain merged model or an expert, or the whole method as it is.

    python tools/export.py runs/X --to peft --task sst2 --out exports/sst2
    python tools/export.py runs/X --to merged --task all --out exports/X
    python tools/export.py runs/X --to expert --task all --out experts
    python tools/export.py runs/X --to adapter --out exports/X
    python tools/export.py runs/X --to peft --approximate task --task all --out exports/X-static

What was written is read back, and the largest difference of its logits from the trained module's is printed: on
validation rows of the task, or on random token ids where the run's data are out of reach. The status is 1 where it is
more than the backbone's dtype explains; the files stay. Experts (of TTLoRA and TTLoRAMoE, for FreezeThenRoute's
expert_paths) and adapters (any method whole, for moe_peft.load_adapter) must be equal to the bit.

A method whose routing depends on the token (TRex) has no LoRA that equals it: --approximate takes the mean of its
routing over training rows of each task, or of each cluster of its prior, and prints how far that is from the routed
method on validation rows. Every folder gets a README.md.
"""

import argparse
import sys
from pathlib import Path

from moe_peft.command_line import mistakes_in_a_line, options, quiet


def arguments() -> argparse.Namespace:
    """Parses the command line."""
    parser = options(__doc__)
    parser.add_argument(
        "checkpoint", metavar="RUN_OR_CHECKPOINT", help="a run's folder (its best checkpoint), or a file"
    )
    parser.add_argument("--to", choices=["peft", "merged", "expert", "adapter"], required=True, help="what to write")
    parser.add_argument("--task", help="the task's name; all: every task, in a sub-folder each")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must not exist, or be empty")
    parser.add_argument("--uniform-rank", action="store_true", help="peft: one rank for all linears, padded with zeros")
    parser.add_argument("--approximate", choices=["task", "cluster"], help="peft, merged: a static LoRA for TRex")
    parser.add_argument("--rows", type=int, help="of a task, to calibrate on, and again to rate on (default: 100)")
    parser.add_argument("--backbone", help="where the backbone's files lie, if not where they lay in training")
    parser.add_argument("--text", action="append", help="a text to compare on (repeatable)")
    parser.add_argument("--push", metavar="REPO_ID", help="then upload the folder to a hub: owner/name")
    parser.add_argument("--public", action="store_true", help="a repository that --push makes is for everyone to see")
    return parser.parse_args()


def main() -> None:
    """Exports and prints the parity; a difference too large ends in status 1, a user's mistake in status 2."""
    given = arguments()

    from moe_peft.interop.export import export, unfaithful
    from moe_peft.interop.hub import check_repo_id, push
    from moe_peft.interop.origin import origin_of
    from moe_peft.messages import one_line
    from moe_peft.runs import load_module

    quiet()
    with mistakes_in_a_line():
        if given.push is not None:
            check_repo_id(given.push)
        module = load_module(given.checkpoint, given.backbone)
        origin = origin_of(given.checkpoint, [spec.name for spec in module.specs], given.backbone)
        more = (given.uniform_rank, given.text, origin, given.approximate, given.rows, given.push)
        exports = export(module, given.to, given.task, given.out, *more)
        for each in exports:
            print(each)
        if origin.data is None and not given.text and given.to in ("peft", "merged"):
            print(f"note: compared on random token ids, because {one_line(origin.lacking)}", file=sys.stderr)
        fault = unfaithful(exports)
        if fault is None and given.push is not None:
            print(f"pushed to {push(given.out, given.push, given.public)}")
    if fault is not None:
        print(f"error: {fault}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
