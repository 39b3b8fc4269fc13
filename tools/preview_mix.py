#!/usr/bin/env python
"""Prints what a configuration's data really are: tasks, filled-in templates, lengths, truncation, the mix drawn.

python tools/preview_mix.py --config configs/quickstart.yaml [--config FILE ...] [--batches N]

Later files overlay earlier ones; `--data.init_args.batch_size 8` and the like change single arguments.
"""

from moe_peft.command_line import mistakes_in_a_line, options


def main() -> None:
    """Parses the command line and prints the preview; a user's mistake ends in one line and status 2."""
    parser = options(__doc__)
    parser.add_argument("--batches", type=int, default=100, help="global batches to draw (default 100)")
    arguments, others = parser.parse_known_args()

    from moe_peft.data.preview import describe_mix

    with mistakes_in_a_line():
        if arguments.batches < 1:
            raise ValueError(f"batches: {arguments.batches} is below 1; give the global batches to draw")
        print(describe_mix(others, arguments.batches))


if __name__ == "__main__":
    main()
