"""What decides over a fit's result: its configuration without places, and the bytes of what it reads.

The code of this package is not part of it: a fit says which commit it was made with.
"""

import hashlib
import inspect
import sysconfig
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from moe_peft.data.sources import TaskFolder, TaskSource
from moe_peft.data.tasks import SPLITS
from moe_peft.reporting.comparison import ASIDE, ASIDE_OF_TRAINER

ASIDE_OF_DATA = ("root", "num_workers")
ASIDE_OF_CHECKPOINT = ("every_n_train_steps", "every_n_minutes")
PLACES = ("name", "path", "folder", "checkpoint", "expert_paths")
"""Arguments whose value may be a file or a folder without a slash in its name."""
PACKAGE = Path(__file__).resolve().parents[1]
INSTALLED = [Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "purelib", "platlib")]


def identity(parsed: Namespace, sources: Sequence[TaskSource]) -> dict[str, Any]:
    """Returns what decides over a result, but for seed and rate.

    Args:
        parsed: a run's configuration with all defaults.
        sources: of its tasks.
    """
    config = {name: value for name, value in parsed.as_dict().items() if name not in ASIDE and name != "config"}
    config["trainer"] = without(config["trainer"], (*ASIDE_OF_TRAINER, "log_every_n_steps"))
    config["checkpoint"] = without(config["checkpoint"], ASIDE_OF_CHECKPOINT)
    config["data"] = config["data"] | {"init_args": without(config["data"]["init_args"], ASIDE_OF_DATA)}
    files = [file for source in sources if isinstance(source, TaskFolder) for file in files_of(source)]
    return weighed(config) | {"files": [bytes_of(file) for file in files]}


def without(section: Mapping[str, Any], aside: Sequence[str]) -> dict[str, Any]:
    """A section but for some of its keys."""
    return {key: value for key, value in section.items() if key not in aside}


def files_of(source: TaskFolder) -> list[Path]:
    """The files of a task folder."""
    return [source.path / "task.json", *(source.file(split) for split in SPLITS)]


def weighed(value: Any, key: str = "") -> Any:
    """A configuration with bytes for the files and folders that it names, and for the code of classes of users."""
    if isinstance(value, Mapping):
        found = {str(key): weighed(own, str(key)) for key, own in value.items()}
        code = code_of(value.get("class_path"))
        return found | ({} if code is None else {"code": code})
    if isinstance(value, list | tuple):
        return [weighed(own, key) for own in value]
    if isinstance(value, Path) or (isinstance(value, str) and ("/" in value or key in PLACES)):
        path = place(value)
        return str(value) if path is None else bytes_of(path)
    return value


def place(value: str | Path) -> Path | None:
    """Returns the file or folder that a value names; None where there is none, or all would lie in it."""
    try:
        path = Path(value).expanduser()
        found = path.exists() and not Path.cwd().is_relative_to(path.resolve())
    except (OSError, RuntimeError):  # no path at all: too long, or of nobody's home
        return None
    return path if found else None


def code_of(class_path: object) -> str | None:
    """Returns the hash of the file that a class lies in; None for one of this package or an installed one."""
    module, _, _ = str(class_path).rpartition(".")
    if not module:
        return None
    file = inspect.getsourcefile(import_module(module))
    path = Path(file or PACKAGE).resolve()
    return None if any(path.is_relative_to(own) for own in (PACKAGE, *INSTALLED)) else bytes_of(path)


def bytes_of(path: Path) -> str:
    """Returns the hash of a file, or of the names and bytes of all files of a folder."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    stats = [(file, file.stat()) for file in files]
    parts = [hash_of(file, stat.st_size, stat.st_mtime_ns) for file, stat in stats]
    if path.is_file():
        return parts[0]
    names = [str(file.relative_to(path)) for file in files]
    return hashlib.sha256(repr(list(zip(names, parts, strict=True))).encode()).hexdigest()


@cache
def hash_of(file: Path, size: int, changed: int) -> str:
    """Returns the hash of a file, which is read once while its size and time stay as they are."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
