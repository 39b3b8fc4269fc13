#!/usr/bin/env python
"""Writes a run's report: one page with its results, routing and training, to be read anywhere, without a network.

    python tools/report.py runs/X                                  # runs/X/report.html
    python tools/report.py runs/X runs/Y runs/Z --out comparison   # comparison/comparison.html
    python tools/report.py --rebuild runs/X                        # routing recorded anew, from the best checkpoint

Beside the page lies report/: every picture as PNG, and the numbers that it shows as CSV. Several runs are compared by
method and configuration, with the mean and the spread over seeds; they must be of the same tasks and base.
"""

import argparse
from pathlib import Path

from moe_peft.command_line import mistakes_in_a_line, options, quiet


def arguments() -> argparse.Namespace:
    """Parses the command line."""
    parser = options(__doc__)
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="a run's folder; several are compared")
    parser.add_argument("--out", type=Path, help="folder to write into; needed for several runs, else the run's own")
    parser.add_argument("--rebuild", action="store_true", help="first record the routing anew from the best checkpoint")
    parser.add_argument("--rows", type=int, help="rebuild: rows of every task and split to record (default 32)")
    parser.add_argument("--backbone", help="rebuild: where the backbone's files lie, if not where they lay in training")
    return parser.parse_args()


def main() -> None:
    """Writes the page and prints where it lies; a user's mistake ends in one line and status 2."""
    given = arguments()

    from moe_peft.reporting.command import report

    quiet()
    with mistakes_in_a_line():
        print(f"Written to {report(given.runs, given.out, given.rebuild, given.rows, given.backbone)}.")


if __name__ == "__main__":
    main()
