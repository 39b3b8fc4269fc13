#!/usr/bin/env python
"""Writes task folders as lm-eval's tasks, which ask the same rows by the same template.

python tools/lm_eval_task.py data/sst2 data/arc_easy --out lm_eval_tasks
python -m moe_peft.interop.lm_eval run --model moe_peft --model_args adapter=runs/X --tasks lm_eval_tasks/*.yaml
"""

import argparse
from pathlib import Path

from moe_peft.command_line import mistakes_in_a_line, options


def arguments() -> argparse.Namespace:
    """Parses the command line."""
    parser = options(__doc__)
    parser.add_argument("folders", metavar="FOLDER", nargs="+", help="a task folder: task.json and its rows")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must not exist, or be empty")
    parser.add_argument("--split", choices=["train", "validation", "test"], default="test", help="whose rows are asked")
    return parser.parse_args()


def main() -> None:
    """Writes the tasks and prints a line about each; a user's mistake ends in one line and status 2."""
    given = arguments()

    from moe_peft.interop.lm_eval.tasks import write_tasks

    with mistakes_in_a_line():
        print("\n".join(write_tasks(given.folders, given.out, given.split)))


if __name__ == "__main__":
    main()
