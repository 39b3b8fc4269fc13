"""Files that are written whole, or not at all."""

import os
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
