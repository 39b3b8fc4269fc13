#!/usr/bin/env python
"""Compares methods on the same tasks, base, training and budget: runs what is missing, then writes one table.

    python tools/compare.py configs/compare/minilm-13.yaml --data.root FOLDERS --dry-run   # what would be run
    python tools/compare.py configs/compare/minilm-13.yaml --data.root FOLDERS
    python tools/compare.py configs/compare/minilm-13.yaml --data.root FOLDERS --pack fits.tar.xz   # --unpack elsewhere

Every method's learning rate is chosen on validation data, with the first seed; then every seed is run with it. What is
finished and unchanged is never run again; after Ctrl-C (or a crash) the same command goes on. The folder `out` of the
comparison gets compare.html, .md, .csv and .json, and all runs. Further arguments, such as --data.root, are those of
`fit`, for every run. --pack writes what is finished into a file, without checkpoints; --unpack takes it from there.
"""

from argparse import Namespace
from pathlib import Path

from moe_peft.command_line import mistakes_in_a_line, options, quiet


def main() -> None:
    """Compares, with a line for every fit; a user's mistake ends in one line and status 2, Ctrl-C in status 130."""
    parser = options(__doc__)
    parser.add_argument("comparison", metavar="COMPARE.yaml", type=Path, help="what is compared (see configs/compare)")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--dry-run", action="store_true", help="only say what would be run")
    mode.add_argument("--tables", action="store_true", help="only write the tables of what is finished by now")
    mode.add_argument("--pack", metavar="FILE.tar.xz", type=Path, help="only write the finished fits into a file")
    mode.add_argument("--unpack", metavar="FILE.tar.xz", type=Path, help="only take finished fits out of a file")
    given, more = parser.parse_known_args()

    quiet()
    with mistakes_in_a_line(Exception):  # jsonargparse and transformers raise a dozen kinds
        try:
            print(done(given, more), flush=True)
        except KeyboardInterrupt:
            print("stopped; the same command goes on", flush=True)
            raise SystemExit(130) from None


def done(given: Namespace, more: list[str]) -> str:
    """Does what was asked for; returns what there is to say at the end."""
    from moe_peft.rack.archive import pack, unpack
    from moe_peft.rack.command import compare, plan
    from moe_peft.rack.preparing import prepare
    from moe_peft.rack.tables import write_tables
    from moe_peft.reporting.words import many

    contest = prepare(given.comparison, more)
    if given.dry_run:
        return "\n".join(plan(contest))
    if given.tables:
        return f"Written to {write_tables(contest, contest.comparison.out)}."
    if given.pack is not None:
        return f"{many(pack(contest, given.pack), 'fit')} written to {given.pack}."
    if given.unpack is not None:
        new, strange, finished = unpack(contest, given.unpack)
        other = f" ({strange} of other settings or defaults)" if strange else ""
        return f"{many(new, 'fit')} taken from {given.unpack}{other}; {finished} of this comparison are finished."
    return f"Written to {compare(contest, lambda line: print(line, flush=True))}."


if __name__ == "__main__":
    main()
