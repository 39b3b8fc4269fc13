"""Compares ways to rank the options of a multiple-choice task: behind one prompt, or each as a sequence of its own.

    python tools/compare_evaluation.py

All ways score the same rows in turns; on a float32 base their scores must be equal (else status 1). Base and data are
SmolLM2-135M and the quickstart's tasks; `--config FILE ...`, `--data.root FOLDER` and the like say otherwise, as for
`python -m moe_peft fit`.
"""

import argparse
from typing import Any

from rich.console import Console

from moe_peft.comparison.command import Parser, base_of, run
from moe_peft.comparison.evaluation import compare_evaluation, ratios, table
from moe_peft.data.module import MultitaskDataModule


def parser() -> Parser:
    """Returns the command line."""
    result = Parser(__doc__, dtype="fp32")
    result.add_argument("--task", default="arc_easy", help="one of the data's, with options (%(default)s)")
    result.add_number("--rows", 48, 1, "of its test split")
    result.add_number("--rounds", 1, 1, "times that every batch is scored")
    return result


def compare(given: argparse.Namespace, data: MultitaskDataModule) -> dict[str, Any]:
    """Compares scores and times."""
    base = base_of(data, given.dtype, given.attention)
    found = compare_evaluation(data, base, given.task, given.rows, given.rounds, given.threads)
    what = f"{found.options} options of {found.rows} rows of {given.task}"
    title = f"{what}, CPU, threads: {given.threads}, {given.dtype} base, attention: {given.attention}"
    Console().print(table(found, title))
    return found._asdict() | {"ratios": ratios(found)}


if __name__ == "__main__":
    run(parser(), compare)
