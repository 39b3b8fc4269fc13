#!/usr/bin/env python
"""Prints what a configuration's data really are: tasks, filled-in templates, lengths, truncation, the mix drawn.

python tools/preview_mix.py --config configs/quickstart.yaml [--config FILE ...] [--batches N]

Later files overlay earlier ones; `--data.init_args.batch_size 8` and the like change single arguments.
"""

import argparse
import sys


def main() -> None:
    """Parses the command line and prints the preview; a user's mistake ends in one line."""
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batches", type=int, default=100, help="global batches to draw (default 100)")
    arguments, others = parser.parse_known_args()
    if arguments.batches < 1:
        sys.exit(f"error: --batches {arguments.batches} must be 1 or more")

    from moe_peft.data.preview import describe_mix

    try:
        print(describe_mix(others, arguments.batches))
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
