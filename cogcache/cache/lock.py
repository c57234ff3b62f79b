"""The lock of a whole cache."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cogcache.cache.files import FileLock, storage_errors

__all__ = ["LOCK_FILE", "cache_lock"]

LOCK_FILE = ".lock"


@contextmanager
def cache_lock(root: Path) -> Iterator[None]:
    """Keep all others out of the cache; whatever the disk refuses inside becomes a :class:`StorageError`."""
    with storage_errors(root):
        lock = FileLock.acquire(root / LOCK_FILE, wait=True)
        try:
            yield
        finally:
            if lock is not None:
                lock.release()
