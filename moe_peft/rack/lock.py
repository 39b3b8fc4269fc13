"""One comparison at a time in a folder: a lock that no crash leaves behind.

The operating system holds it for as long as a process has the file open, this one or a fit that it started: a fit that
outlives its comparison keeps others away from the folder until it ends. What the file says is for people only.
"""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NAME = ".lock"


@contextmanager
def locked(folder: Path) -> Iterator[int]:
    """Within: the folder belongs to this process and to those that inherit the file descriptor it gives.

    Raises:
        ValueError: another process has it, or the folder cannot be written.
    """
    path = folder / NAME
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise ValueError(f"out: '{folder}' cannot be written ({error.strerror}); name another folder") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "another process"
        os.close(descriptor)
        raise ValueError(
            f"out: '{folder}' is being written by {holder}; wait for its end, or name another folder"
        ) from None
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        yield descriptor
    finally:
        os.close(descriptor)
