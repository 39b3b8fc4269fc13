"""What the tools have in common on the command line; importing it costs nothing."""

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator


def options(description: str | None) -> argparse.ArgumentParser:
    """Returns a parser whose help is a tool's own docstring, and which takes no shortened option."""
    form = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(description=description, allow_abbrev=False, formatter_class=form)


@contextlib.contextmanager
def mistakes_in_a_line(*kinds: type[Exception], status: int = 2) -> Iterator[None]:
    """Within: an error ends the process in one line on stderr; MOE_PEFT_TRACEBACK shows all of it.

    Args:
        kinds: of errors; ValueError and OSError where none are given.
        status: of the process.
    """
    caught = kinds or (ValueError, OSError)
    try:
        yield
    except caught as error:
        if os.environ.get("MOE_PEFT_TRACEBACK"):
            raise
        from moe_peft.messages import one_line

        text = error.args[0] if isinstance(error, KeyError) else error  # which would be quoted
        print(f"error: {one_line(str(text))}", file=sys.stderr)
        sys.exit(status)
