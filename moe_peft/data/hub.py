"""Loading `datasets` data sets, from a folder or from the hub."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def load_splits(path: str, config: str | None, name: str) -> Mapping[str, Any]:
    """Loads a data set from a folder or from the hub.

    Args:
        path: A folder written by `save_to_disk` (one split or several), or a hub id.
        config: The hub data set's configuration.
        name: The task's name, for the message.

    Returns:
        The splits by name; a folder with one split has the folder's name for it.

    Raises:
        ValueError: Neither a readable folder nor a data set that the hub gives now.
    """
    import datasets

    folder = Path(path).expanduser()
    try:
        if folder.is_dir() and ((folder / "dataset_info.json").is_file() or (folder / "dataset_dict.json").is_file()):
            found = datasets.load_from_disk(str(folder))
        else:
            found = datasets.load_dataset(path, config)
    except Exception as error:  # the hub's client raises a dozen unrelated types, offline ones among them
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"task '{name}': cannot load '{path}' ({reason}); give a folder written by save_to_disk, or go online once."
        ) from None
    return {folder.name: found} if isinstance(found, datasets.Dataset) else {str(key): found[key] for key in found}
