"""A page on the disk, and beside it its pictures as PNG and their numbers as CSV."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moe_peft.reporting.drawing import Picture
from moe_peft.writing import write_text

PICTURES = "report"
"""The folder beside the page that holds its pictures as PNG and their numbers as CSV."""


def write_page(path: Path, content: str, pictures: Sequence[Picture]) -> Path:
    """Writes a page, last, and before it the pictures and their numbers beside it."""
    folder = path.parent / PICTURES
    folder.mkdir(parents=True, exist_ok=True)
    for picture in pictures:
        (folder / f"{picture.name}.png").write_bytes(picture.png)
        write_text(folder / f"{picture.name}.csv", as_csv(picture.header, picture.rows))
    write_text(path, content)
    return path


def as_csv(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table as the text of a CSV file."""
    stream = io.StringIO()
    csv.writer(stream, lineterminator="\n").writerows([header, *rows])
    return stream.getvalue()
