"""What all commands have in common; importing it costs nothing."""

import argparse
import contextlib
import logging
import os
import sys
import warnings
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


def quiet() -> None:
    """Silences messages that no user of this package can act on."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\).*")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*exists and is not empty.*")
    warnings.filterwarnings("ignore", message=".*It is recommended to use `self.log.*sync_dist=True.*")  # alike already
    warnings.filterwarnings("ignore", message=".*module.* in eval mode at the start of training.*")
    warnings.filterwarnings("ignore", message="The dirpath has changed from.*")
    warnings.filterwarnings("ignore", message=".*could not find the monitored key.*")  # before the first validation
    for name in ("lightning.pytorch", "lightning.fabric", "pytorch_lightning"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    from transformers.utils import logging as hf_logging

    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
