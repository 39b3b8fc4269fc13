"""`python -m moe_peft.interop.lm_eval run …`: lm-eval's own command line, which knows the model `moe_peft`."""

import importlib.util
import sys

from moe_peft.command_line import mistakes_in_a_line


def main() -> None:
    """Hands the command line on; a user's mistake ends in one line and status 2."""
    if importlib.util.find_spec("lm_eval") is None:
        print("error: lm-eval is not installed: pip install 'lightning-moe-peft[lm-eval]'", file=sys.stderr)
        sys.exit(2)
    from lm_eval.__main__ import cli_evaluate

    import moe_peft.interop.lm_eval.model  # noqa: F401  (registers itself)

    with mistakes_in_a_line(ValueError, OSError, KeyError):  # a KeyError is an unknown model or task of lm-eval's
        cli_evaluate()


if __name__ == "__main__":
    main()
