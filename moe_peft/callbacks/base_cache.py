"""The untouched base's answers to a test's rows, kept from run to run: nothing that a fit trains changes them."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moe_peft.files import CACHE
from moe_peft.predictions import Prediction
from moe_peft.writing import write_text

if TYPE_CHECKING:
    from moe_peft.callbacks.results import TestedModule

FOLDER = CACHE / "base"
PROTOCOL = "summed log-likelihood of the option text, no end token; greedy generation"
"""Part of the key: change it when the way rows are scored changes."""


def key(module: "TestedModule", rows: str, precision: str) -> str:
    """Returns the name of the file for a base on some rows: a hash of all that its answers depend on.

    Args:
        module: whose base it is.
        rows: fingerprint of what the base is shown (`MultitaskDataModule.cache_key`).
        precision: the trainer's.
    """
    backbone = module.backbone
    base = [module.fingerprint, rows, backbone.kind, str(backbone.dtype)]
    return hashlib.sha256(json.dumps([PROTOCOL, *base, precision, str(module.max_new_tokens)]).encode()).hexdigest()


def read(path: Path) -> list[Prediction] | None:
    """Reads a file; None if there is none or it is damaged."""
    try:
        header, *lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
        rows = [Prediction.from_json(line) for line in lines]
        return rows if json.loads(header)["rows"] == len(rows) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write(path: Path, rows: Sequence[Prediction]) -> None:
    """Writes a file, and its folder where there is none.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    header = json.dumps({"rows": len(rows)})
    write_text(path, "".join(line + "\n" for line in [header, *(row.to_json() for row in rows)]))
