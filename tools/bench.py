"""Measures what adapters cost, in one interleaved run on this machine.

    python tools/bench.py --out bench                        everything; some minutes
    python tools/bench.py --out bench --quick                d=576, bf16, few rounds; under a minute
    python tools/bench.py --out bench --sections step --backbone configs/bases/smollm2-135m.yaml
    python tools/bench.py --figures tests/benchmark_figures.csv       writes the figures that CI compares with

Sections: adapter (one linear, every variant, with DESIGN's targets), growth (with the number of experts and tasks),
step (a whole training step) and decoding (a token, with a cache). Times are CPU times of this process, on a GPU times
between events: only ratios of one run mean something. All outputs and gradients are compared with the plain formula
before anything is timed.
"""

import argparse
import platform
import sys
from pathlib import Path

import torch
from rich.console import Console

from moe_peft.benchmark import decoding, models, output, steps, suite, targets
from moe_peft.benchmark.setting import DTYPES, Setting
from moe_peft.benchmark.timing import threads
from moe_peft.command_line import mistakes_in_a_line

SECTIONS = ("adapter", "growth", "step", "decoding")
REFERENCES = (suite.EAGER_8, suite.PEFT, suite.BARE, steps.FROZEN)
"""Whose ratios are printed; the files have those of all pairs."""
WIDTH = 130
"""Characters of a table that goes to no terminal."""


class Parser(argparse.ArgumentParser):
    """Raises what the user did wrong."""

    def error(self, message: str) -> None:  # type: ignore[override]
        """Raises ValueError instead of printing the usage."""
        raise ValueError(message)


def numbers(text: str) -> list[int]:
    """Reads "576,2048"."""
    return [int(number) for number in text.split(",")]


def words(text: str) -> list[str]:
    """Reads "adapter,step"."""
    return text.split(",")


def parse() -> argparse.Namespace:
    """Reads the command line.

    Raises:
        ValueError: an option that there is not, or a value that it does not take.
    """
    parser = Parser(description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for results.csv, targets.csv, results.json and results.png")
    parser.add_argument("--sections", type=words, default=list(SECTIONS), help="of the above (all)")
    parser.add_argument("--quick", action="store_true", help="few rounds of one width and dtype")
    parser.add_argument("--widths", type=numbers, help="features in and out of the linear (576,2048)")
    parser.add_argument("--dtypes", type=words, help="of the base (fp32,bf16)")
    parser.add_argument("--rounds", type=int, help="calls of every variant (40; whole steps 10)")
    parser.add_argument("--rows", type=int, default=16, help="rows of a batch of one linear (%(default)s)")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of a row (%(default)s)")
    parser.add_argument("--step-rows", type=int, default=8, help="rows of a step's batch (%(default)s)")
    parser.add_argument(
        "--backbone", type=Path, help="file of configs/bases for step and decoding (a small random one)"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="(%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of torch (%(default)s)")
    parser.add_argument("--figures", type=Path, help="file to write the stable figures to, and nothing else")
    given = parser.parse_args()
    given.widths = given.widths or ([576] if given.quick else [576, 2048])
    given.dtypes = given.dtypes or (["bf16"] if given.quick else list(DTYPES))
    given.rounds = given.rounds if given.rounds is not None else 10 if given.quick else 40
    check(given)
    return given


def check(given: argparse.Namespace) -> None:
    """Refuses what cannot be measured.

    Raises:
        ValueError: see there.
    """
    for name in ("threads", "rounds", "step_rows"):
        if getattr(given, name) < 1:
            raise ValueError(f"{name}: {getattr(given, name)} is below 1")
    for section in given.sections:
        if section not in SECTIONS:
            raise ValueError(f"sections: {section!r} is unknown; use {', '.join(SECTIONS)}")
    for width in given.widths:
        for dtype in given.dtypes:
            Setting(width, given.rows, given.tokens, dtype, True, device=given.device).check()
    if given.figures is None and given.out is None:
        raise ValueError("out: give a folder for the results")
    if given.figures is not None and not given.figures.absolute().parent.is_dir():
        raise ValueError(f"figures: the folder of '{given.figures}' does not exist; make it first")
    if given.out is not None and given.out.exists() and not given.out.is_dir():
        raise ValueError(f"out: '{given.out}' is a file; give a folder")
    models.backbone_of(given.backbone)


def screen() -> Console:
    """Returns where tables go."""
    return Console(width=None if sys.stdout.isatty() else WIDTH)


def measure(given: argparse.Namespace) -> dict[str, output.Rows]:
    """Measures the sections that were asked for."""
    sizes = Setting(given.widths[0], given.rows, given.tokens, given.dtypes[0], True, device=given.device)
    whole, found = max(2, given.rounds // 4), {}
    backbone = models.backbone_of(given.backbone)
    for section in SECTIONS:
        if section not in given.sections:
            continue
        if section == "adapter":
            rows = suite.adapter_section(sizes, given.widths, given.dtypes, given.rounds)
        elif section == "growth":
            rows = suite.growth_section(sizes, given.widths[0], given.dtypes[0], given.rounds)
        elif section == "step":
            rows = steps.step_section(backbone, given.step_rows, given.tokens, whole, given.device)
        else:
            rows = decoding.decoding_section(backbone, given.step_rows, given.tokens, whole, given.device)
        found[section] = rows
        for job in output.jobs(rows):
            screen().print(output.times_table(job, REFERENCES))
    return found


def main() -> None:
    """Measures, prints and writes; a user's mistake ends in one line and status 2."""
    with mistakes_in_a_line():
        given = parse()
        if given.figures is not None:
            output.write_figures(given.figures, suite.stable_figures())
            return
        given.out.mkdir(parents=True, exist_ok=True)
        with threads(given.threads):
            found = measure(given)
    adapters = found.get("adapter", [])
    verdicts, rules = targets.verdicts(adapters), targets.rules(adapters) if adapters else []
    if adapters:
        screen().print(output.target_table(verdicts, rules))
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(given).items()}
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    output.write_all(given.out, settings | versions, found, verdicts)


if __name__ == "__main__":
    main()
