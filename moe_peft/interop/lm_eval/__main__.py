"""`python -m moe_peft.interop.lm_eval run …`: lm-eval's own command line, which knows the model `moe_peft`."""

import importlib.util
import os
import sys

from moe_peft.messages import one_line


def main() -> None:
    """Hands the command line on; a user's mistake ends in one line and status 2."""
    if importlib.util.find_spec("lm_eval") is None:
        print("error: lm-eval is not installed: pip install 'lightning-moe-peft[lm-eval]'", file=sys.stderr)
        sys.exit(2)
    from lm_eval.__main__ import cli_evaluate

    import moe_peft.interop.lm_eval.model  # noqa: F401  (registers itself)

    try:
        cli_evaluate()
    except (ValueError, OSError, KeyError) as error:  # a KeyError is an unknown model or task of lm-eval's
        if os.environ.get("MOE_PEFT_TRACEBACK"):
            raise
        text = error.args[0] if isinstance(error, KeyError) else error
        print(f"error: {one_line(str(text))}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
