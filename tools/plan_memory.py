"""Prints how much memory a run needs on every GPU, with DDP and FSDP2: no download, no weights, no GPU.

    python tools/plan_memory.py --config configs/bases/llama3.1-8b.yaml --config configs/data/folders.yaml \
        --config configs/llama3.1-8b-8gpus.yaml --gpus 8

Later files overlay earlier ones; `--model.r1 8`, `--data.batch_size 32` and the like change single arguments. Rows,
tokens and tasks are the configuration's own (`--rows`, `--tokens`, `--tasks` say otherwise); answers are as long as
`model.max_new_tokens` (`--answer_tokens`). The dtype "auto" is this machine's own. The last line is JSON, in bytes.
"""

import json

from rich.console import Console
from rich.table import Table

from moe_peft.command_line import mistakes_in_a_line
from moe_peft.memory import PARTS, plan_memory, run_parser

SIZES = ("tasks", "rows", "tokens", "answer_tokens")


def main() -> None:
    """Parses the configuration, plans, prints a table and JSON; a user's mistake ends in one line and status 2."""
    parser = run_parser()
    parser.add_argument("--gpus", type=int, required=True, help="number of GPUs, on all nodes together")
    for size in SIZES:
        parser.add_argument(f"--{size}", type=int, help=f"number of {size.replace('_', ' ')}")
    with mistakes_in_a_line(Exception):  # jsonargparse and transformers raise a dozen kinds
        config = parser.parse_args()
        plan = plan_memory(config, config.gpus, **{size: config[size] for size in SIZES})
    plans = plan["plans"]
    table = Table("GiB per GPU", *plans, title=", ".join(f"{size} {plan[size]}" for size in ("gpus", *SIZES, "dtype")))
    for part in (*PARTS, "total"):
        table.add_row(part, *(f"{own[part] / 2**30:.3f}" for own in plans.values()))
    Console().print(table)
    print(json.dumps(plan))


if __name__ == "__main__":
    main()
