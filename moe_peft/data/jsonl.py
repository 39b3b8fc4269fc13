"""Reading JSON lines, plain or gzipped; damage is named by file and line."""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path

from moe_peft.data.tasks import Row


def read_rows(file: Path) -> Iterator[Row]:
    """Reads the rows of a `.jsonl` or `.jsonl.gz` file one by one.

    Raises:
        ValueError: A line that is no JSON object, or a damaged file.
    """
    opened = gzip.open(file, "rt", encoding="utf-8") if file.suffix == ".gz" else file.open(encoding="utf-8")
    with opened as lines:
        try:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _parse(line, file, number)
        except (EOFError, OSError, UnicodeDecodeError) as error:
            raise ValueError(f"'{file}' is damaged ({error}); write it again.") from None


def _parse(line: str, file: Path, number: int) -> Row:
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    if not isinstance(row, dict):
        raise ValueError(f"'{file}' line {number} is no JSON object; correct or remove it.")
    return row
