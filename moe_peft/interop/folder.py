"""Folders that appear whole or not at all."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def new_folder(folder: str | Path) -> Iterator[Path]:
    """Yields an empty folder to write into, and gives it its name when the block has gone well.

    Args:
        folder: the name it will have; no such path yet, or an empty folder.

    Raises:
        ValueError: the path is taken.
    """
    refuse_taken(folder)
    final = Path(folder).absolute()
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = final.with_name(f".{final.name}.{os.getpid()}")
    temporary.mkdir()
    try:
        yield temporary
        for file in filter(Path.is_file, temporary.rglob("*")):
            file.chmod(temporary.stat().st_mode & 0o666)  # safetensors shuts everybody else out, whatever the umask
        temporary.rename(final)
    except BaseException:
        shutil.rmtree(temporary)
        raise


def refuse_taken(folder: str | Path) -> None:
    """Raises one line if a path cannot become a new folder, for work that takes its time before it writes."""
    path = Path(folder)
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ValueError(f"out: '{folder}' exists and is not an empty folder; name another one")
