#!/usr/bin/env python
"""Prints the configuration of a method whose trainable parameters are nearest to a number, and not below it.

    python tools/fit_budget.py --method mola --base minilm-l6 --parameters 400000 --tasks 13 > mola-400k.yaml

The method and the base are YAMLs, by path or by name in configs/methods and configs/bases; a class will do as a
method. What is found is the method's own size (its rank, mostly; T-REX's r2); all other arguments are as the YAML has
them, or as `--model.top_k 1` and the like say. Counted are the adapters; classifier heads are left out, as they are the
same for every method. No download, no weights. What is printed is a file for another `--config` of `fit`, after those
two.
"""

from moe_peft.command_line import mistakes_in_a_line, options


def main() -> None:
    """Parses the command line, prints the overlay; a user's mistake ends in one line and status 2."""
    parser = options(__doc__)
    parser.add_argument("--method", required=True, help="a YAML, its name in configs/methods, or a class")
    parser.add_argument("--base", required=True, help="a YAML, or its name in configs/bases")
    parser.add_argument("--parameters", type=int, required=True, help="the budget, of the adapters")
    parser.add_argument("--tasks", type=int, default=8, help="number of tasks (default 8)")
    given, more = parser.parse_known_args()

    from moe_peft.budget import fit_budget, method_arguments, overlay, parse_model

    with mistakes_in_a_line(Exception):  # jsonargparse and transformers raise a dozen kinds
        arguments = method_arguments(given.method, given.base)
        fitted = fit_budget(parse_model([*arguments, *more]), given.parameters, given.tasks)
        print(overlay(arguments, fitted, more), end="")


if __name__ == "__main__":
    main()
