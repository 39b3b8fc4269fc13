"""Reading and writing the two kinds of files that an exported folder holds, with one line for whatever is wrong."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor


def read_json(file: Path) -> dict[str, Any]:
    """Reads a file that holds a JSON object.

    Raises:
        ValueError: no such file, or another content.
    """
    if not file.is_file():
        raise ValueError(f"'{file}' is no file; name a whole exported folder")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:  # not UTF-8, or not JSON
        content = None
    if not isinstance(content, dict):
        raise ValueError(f"'{file}' is truncated or no JSON object; export the folder again")
    return content


def read_about(file: Path, known: int) -> dict[str, Any]:
    """Reads the description of a folder in a format of our own.

    Args:
        file: the description.
        known: the format's number here.

    Raises:
        ValueError: see `read_json`, or another format.
    """
    about = read_json(file)
    if about.get("format") != known:
        raise ValueError(
            f"'{file}' has format {about.get('format')!r}, which is unknown here (known: {known}); use the version of "
            "moe_peft that wrote it"
        )
    return about


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Writes a JSON object."""
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_tensors(file: Path, as_stored: bool = False) -> dict[str, Tensor]:
    """Reads a safetensors file.

    Args:
        file: the file.
        as_stored: keep the tensors' dtypes; else all become fp32.

    Raises:
        ValueError: no such file, a truncated one, or a value that is not finite.
    """
    if not file.is_file():
        raise ValueError(f"'{file}' is no file; name a whole exported folder")
    try:
        tensors = load_file(file)
    except SafetensorError:
        raise ValueError(f"'{file}' is truncated or no safetensors file; export the folder again") from None
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"'{file}': {name} holds values that are not finite; export it again from a sound run")
    return tensors if as_stored else {name: tensor.float() for name, tensor in tensors.items()}
