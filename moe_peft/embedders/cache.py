"""A content-addressed cache of embeddings: looked up by what was embedded, never by a row's number.

One small file per vector, written under a temporary name and renamed, so that ranks and runs can share a folder.
"""

import contextlib
import hashlib
import logging
import os
import uuid
from pathlib import Path
from typing import Self

import numpy

logger = logging.getLogger(__name__)

MEMORY_LIMIT = 512 * 2**20
"""Bytes of vectors that a cache keeps in memory. Those that come later are on disk only, if there is a folder: to drop
the oldest instead would drop every vector before it is asked for again, where an epoch is larger than the limit."""


class EmbeddingCache:
    """Vectors by content key, in memory and optionally on disk.

    Args:
        folder: where vectors persist; None keeps them in memory.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        # Plain arrays: tensors made under inference mode could not take part in training later.
        self._memory: dict[str, numpy.ndarray] = {}
        self._bytes = 0

    @classmethod
    def at(cls, cache_dir: str | None) -> Self:
        """Returns the cache that a `cache_dir` argument names: "auto" is `embeddings` in the project's cache."""
        from moe_peft.files import CACHE

        if cache_dir is None:
            return cls(None)
        return cls(CACHE / "embeddings" if cache_dir == "auto" else Path(cache_dir).expanduser())

    @staticmethod
    def key(*parts: str) -> str:
        """Hashes the parts, keeping their borders."""
        return hashlib.sha256("".join(f"{len(part)}:{part}" for part in parts).encode()).hexdigest()

    def get(self, key: str) -> numpy.ndarray | None:
        """Returns the vector, or None if it is unknown or its file is damaged."""
        if key in self._memory or self.folder is None:
            return self._memory.get(key)
        try:
            vector = numpy.load(self._file(self.folder, key), allow_pickle=False)
        except (OSError, ValueError, EOFError):
            return None
        self._remember(key, vector)
        return vector

    def put(self, key: str, vector: numpy.ndarray) -> None:
        """Stores a vector; a folder that cannot be written costs speed only, so it is reported once and left."""
        self._remember(key, vector)
        if self.folder is None:
            return
        file = self._file(self.folder, key)
        temporary = file.with_name(f"{uuid.uuid4().hex}.tmp")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as stream:
                numpy.save(stream, vector, allow_pickle=False)
            os.replace(temporary, file)
        except OSError as error:
            logger.warning("cache_dir: embeddings are not kept on disk (%s)", error)
            self.folder = None
            with contextlib.suppress(OSError):
                temporary.unlink()

    def _remember(self, key: str, vector: numpy.ndarray) -> None:
        if key not in self._memory and self._bytes + vector.nbytes <= MEMORY_LIMIT:
            # A copy: a row of a larger array would keep all of it alive.
            self._memory[key] = vector.copy()
            self._bytes += vector.nbytes

    @staticmethod
    def _file(folder: Path, key: str) -> Path:
        return folder / key[:2] / f"{key}.npy"
