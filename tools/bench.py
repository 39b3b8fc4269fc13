"""Shows what an adapter costs in time and memory against the number of experts, on this machine's CPU.

    python tools/bench.py --experts 1,17,100,1000

Times are CPU times of this process out of one interleaved run: only their ratios mean something. Every variant is
compared with the plain formula before it is timed. `--json FILE` keeps all numbers, with the ratios of all pairs.
"""

import argparse
import json
import platform
import sys
from pathlib import Path

import torch
from rich.console import Console

from moe_peft.benchmark import DTYPES, AdapterBench, add_experts, table, threads


class Parser(argparse.ArgumentParser):
    """Raises what the user did wrong."""

    def error(self, message: str) -> None:  # type: ignore[override]
        """Raises ValueError instead of printing the usage."""
        raise ValueError(message)


def numbers(text: str) -> list[int]:
    """Reads "1,17,100"."""
    return [int(number) for number in text.split(",")]


def parse() -> argparse.Namespace:
    """Reads the command line.

    Raises:
        ValueError: an option that there is not, or a value that it does not take.
    """
    parser = Parser(description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=numbers, default=[1, 17, 100, 1000], help="numbers of experts (%(default)s)")
    parser.add_argument("--width", type=int, default=576, help="features in and out of the linear (%(default)s)")
    parser.add_argument("--rows", type=int, default=16, help="rows of a batch (%(default)s)")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of a row (%(default)s)")
    parser.add_argument("--rank", type=int, default=5, help="rank of experts and LoRA (%(default)s)")
    parser.add_argument("--dtype", choices=list(DTYPES), default="fp32", help="of the base (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of torch (%(default)s)")
    parser.add_argument("--rounds", type=int, default=100, help="calls of every variant (%(default)s)")
    parser.add_argument("--json", type=Path, help="file to write all numbers to")
    given = parser.parse_args()
    for name in ("threads", "rounds"):
        if getattr(given, name) < 1:
            raise ValueError(f"{name}: {getattr(given, name)} is below 1")
    if given.json is not None and not given.json.absolute().parent.is_dir():
        raise ValueError(f"json: the folder of '{given.json}' does not exist; make it first")
    return given


def main() -> None:
    """Measures, prints a table for inference and one for training; a user's mistake ends in one line and status 2."""
    try:
        given = parse()
        benches = {}
        for job in ("inference", "training"):
            bench = AdapterBench(given.width, given.rows, given.tokens, given.dtype, job == "training")
            add_experts(bench, given.rank, given.experts)
            benches[job] = bench
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(given).items()}
    results = {"settings": settings, "versions": {"torch": torch.__version__, "python": platform.python_version()}}
    with threads(given.threads):
        for job, bench in benches.items():
            results[job] = bench.measure(given.rounds)
            title = f"{job}, CPU: {given.rows} rows of {given.tokens} tokens, width {given.width}, rank {given.rank}"
            references = [variant.name for variant in bench.variants[:3]]  # both LoRAs and the smallest bank
            Console().print(table(f"{title}, {given.dtype}", results[job], references))
    if given.json is not None:
        given.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
