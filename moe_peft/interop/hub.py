"""Folders by their id on a hub, for those who have one: pulled whole into its cache, pushed when they are complete."""

import re
from pathlib import Path
from typing import Any

ID = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")
FILES = ["*.json", "*.safetensors"]
"""What is ever read of a hub's folder: nothing pickled."""


def local_folder(name: str | Path) -> Path:
    """Returns where a folder lies on this machine.

    Args:
        name: a folder, which is itself; else the id of one on the hub, `owner/name` or `owner/name@revision`, which is
            downloaded (or found in the hub's cache).

    Raises:
        ValueError: neither of the two.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    found = ID.fullmatch(str(name))
    if found is None or folder.exists():
        raise ValueError(f"'{name}' is no folder; name one that tools/export.py or PEFT wrote, or its id on a hub")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(found[1], revision=found[2], allow_patterns=FILES))
    except Exception as error:  # the client's own errors, its HTTP library's and the system's have no common class
        raise ValueError(
            f"'{name}' is no folder here, and no hub gave it ({_reason(error)}); name a folder, or an id where a hub "
            "is in reach"
        ) from None


def check_repo_id(repo_id: str) -> None:
    """Refuses what can be no repository on a hub, before anything is made that shall be pushed there.

    Raises:
        ValueError: see there.
    """
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except ValueError as error:
        raise ValueError(f"push: {_reason(error)}; give owner/name") from None


def push(folder: str | Path, repo_id: str, public: bool = False) -> str:
    """Uploads a complete folder to a hub, into a repository that is made if need be.

    Args:
        folder: what to upload.
        repo_id: `owner/name`, or the name alone for the token's owner.
        public: who may see a repository that is made here. By default its owner alone: what was published once cannot
            be taken back. A repository that exists stays as visible as it is.

    Returns:
        Its address.

    Raises:
        ValueError: no hub in reach, no token, or no right to write there.
    """
    from huggingface_hub import HfApi

    try:
        made: Any = HfApi().create_repo(repo_id, private=not public, exist_ok=True)
        HfApi().upload_folder(repo_id=made.repo_id, folder_path=folder, commit_message="Upload from moe_peft")
    except Exception as error:  # see `local_folder`
        raise ValueError(
            f"push: '{folder}' is complete but could not be uploaded ({_reason(error)}); log in (`hf auth login`) and "
            f"go on with `hf upload {repo_id} {folder}`"
        ) from None
    return str(made)


def _reason(error: Exception) -> str:
    """Returns the first line of an error, without its full stop."""
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__).rstrip(". ")
