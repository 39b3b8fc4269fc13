"""Prints how many parameters a method trains on a backbone, from the meta device: no download, no weights.

    python tools/count_parameters.py --config configs/paper/trex.yaml --config configs/bases/llama2-13b.yaml

Later files overlay earlier ones; `--model.r1 8` and the like change single arguments; `--tasks N` sets the number of
tasks (methods with task embeddings or heads depend on it). The last line is JSON.
"""

import json

from rich.console import Console
from rich.table import Table

from moe_peft.command_line import mistakes_in_a_line
from moe_peft.counting import build_on_meta, count_parameters, model_parser


def main() -> None:
    """Parses the configuration, counts, prints a table and JSON; a user's mistake ends in one line and status 2."""
    parser = model_parser()
    parser.add_argument("--tasks", type=int, default=8, help="number of tasks")
    with mistakes_in_a_line(Exception):  # jsonargparse and transformers raise a dozen kinds
        config = parser.parse_args()
        counts = count_parameters(build_on_meta(config, config.tasks))
    table = Table("part", "parameters")
    for part, number in counts.items():
        table.add_row(part, f"{number:,}" if isinstance(number, int) else f"{number} %")
    Console().print(table)
    print(json.dumps(counts))


if __name__ == "__main__":
    main()
