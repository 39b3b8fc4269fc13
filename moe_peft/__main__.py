"""`python -m moe_peft`: answers --version and a bare --help at once, and hands everything else to the CLI."""

import sys
from importlib import metadata

from moe_peft import __version__

HELP = f"""moe_peft {__version__}: multi-task mixture-of-experts parameter-efficient fine-tuning

usage: python -m moe_peft <command> --config FILE [--config FILE ...] [--section.argument VALUE ...]

commands:
  fit        train, evaluate on the test split, write results (needs a model, data and trainer section)
  validate   evaluate on the validation split
  test       evaluate a checkpoint:  test --config <run>/config.yaml --ckpt_path <run>/checkpoints/best.ckpt
  predict    write one JSON line per input: scores per option, the choice, the task, the routing

  <command> --help           all arguments
  <command> --model.help LoRA|TRex   arguments of a method
  <command> --config ... --print_config   the merged configuration
"""


def refuse_foreign_distribution() -> None:
    """Exits if the unrelated distribution `moe-peft` is installed: it writes into the same import package."""
    try:
        version = metadata.version("moe-peft")
    except metadata.PackageNotFoundError:
        return
    print(
        f"error: the distribution moe-peft {version} is installed and owns the same import name moe_peft; "
        "run `pip uninstall moe-peft`, then reinstall lightning-moe-peft",
        file=sys.stderr,
    )
    sys.exit(2)


def main(argv: list[str] | None = None) -> None:
    """Runs the command line."""
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments in (["--help"], ["-h"]):
        print(HELP)
        return
    if arguments == ["--version"]:
        print(__version__)
        return
    refuse_foreign_distribution()
    from moe_peft.cli import run

    run(arguments)


if __name__ == "__main__":
    main()
