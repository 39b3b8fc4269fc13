#!/usr/bin/env python
r"""Adds an expert that was trained elsewhere to a trained mixture (TTLoRAMoE), without touching those it has.

    python tools/add_expert.py runs/mixture --expert exports/wic --task wic --out runs/mixture-wic
    python tools/add_expert.py runs/mixture --expert some-peft-lora --out runs/more \
        --task '{class_path: moe_peft.data.sources.TaskFolder, init_args: {path: wic, test_rows: 500}}'

The expert is what `tools/export.py --to expert` wrote, or a LoRA in Hugging Face PEFT's files, which is compressed to
tensor trains at the mixture's rank (its relative error is printed). The router learns the new expert from training
prompts; how the old tasks' validation rows were routed before and are now is printed, always.
"""

import argparse
from pathlib import Path

from moe_peft.command_line import mistakes_in_a_line, options, quiet


def arguments() -> argparse.Namespace:
    """Parses the command line."""
    parser = options(__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="the mixture's run folder (its best checkpoint is taken)")
    parser.add_argument("--expert", type=Path, required=True, help="folder of the trained expert")
    parser.add_argument("--task", required=True, help="folder of its task's rows, below the run's data.root; or YAML")
    parser.add_argument("--out", type=Path, required=True, help="run folder to write; must not exist, or be empty")
    parser.add_argument("--rows", type=int, help="training rows of a task that the router learns from")
    parser.add_argument("--backbone", help="where the backbone's files lie, if not where they lay in training")
    return parser.parse_args()


def main() -> None:
    """Adds the expert and prints what became of the routing; a user's mistake ends in one line and status 2."""
    given = arguments()

    from moe_peft.interop.growth import add_expert

    quiet()
    with mistakes_in_a_line():
        print(add_expert(given.run, given.expert, given.task, given.out, given.rows, given.backbone))


if __name__ == "__main__":
    main()
