"""Files that are written whole, or not at all, and the tables in them."""

import os
from collections.abc import Sequence
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Writes a whole file or none.

    Raises:
        OSError: one line that names the file.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(
            f"cannot write {path} ({error.strerror}): free the disk or make the folder writable (results of a fit that "
            "are missing: test its checkpoint)"
        ) from None


def as_markdown(table: Sequence[Sequence[str]]) -> list[str]:
    """A table's lines in Markdown; the first row is its header."""
    rule = ["---"] * len(table[0])
    return ["| " + " | ".join(cells) + " |" for cells in (table[0], rule, *table[1:])]
