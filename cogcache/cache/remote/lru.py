"""Bytes fetched from a server, kept on this machine up to a size; what was used longest ago goes first.

Threads and processes share one folder. Every file holds what its key names or is worthless: nothing here is trusted,
whoever asks checks what comes back.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from cogcache.cache.files import FileLock
from cogcache.cache.regular import LARGEST_FILE, read_regular
from cogcache.errors import StorageError
from cogcache.memory import cache_folder
from cogcache.progress import say

__all__ = ["DEFAULT_BYTES", "Lru", "default_folder"]

DEFAULT_BYTES = 20 * 10**9
_DIGITS = 30
_KEPT_SHARE = 0.9
"""How full the folder is after making room, so that room is not made for every single file."""


def default_folder() -> Path:
    """``$XDG_CACHE_HOME/cogcache/remote``, by default under ``~/.cache``."""
    return cache_folder() / "remote"


class Lru:
    """A folder of at most ``limit`` bytes of files, each under a key. 0 keeps nothing.

    Trouble with the disk costs speed, not the run: it is told once, and nothing more is kept.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self._limit = folder.absolute(), limit
        self._total = self.folder / "total"
        self._works = limit > 0

    def _path(self, key: str) -> Path:
        name = hashlib.sha256(key.encode()).hexdigest()
        return self.folder / name[:2] / name

    def get(self, key: str, most: int = LARGEST_FILE) -> bytes | None:
        """What was put under ``key``, if it is still there; maybe damaged, but not more than ``most`` bytes."""
        if not self._works:
            return None
        path = self._path(key)
        try:
            if path.stat().st_size > most:
                return None
            data = read_regular(path)
            os.utime(path)  # last used now
        except OSError:
            return None
        return data

    def drop(self, key: str) -> None:
        """Forget what is under ``key``: it turned out to be damaged."""
        with suppress(OSError):
            self._path(key).unlink()

    def put(self, key: str, data: bytes) -> None:
        """Keep ``data`` under ``key``; it appears whole or not at all."""
        if not self._works or len(data) > self._limit:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock.acquire(self.folder / "lock", wait=True)
            assert lock is not None
            with lock:
                self._write(self._path(key), data)
        except (OSError, StorageError) as error:
            self._works = False
            say(f"NOTICE: {self.folder} cannot be written ({error}); going on without a local cache.")

    def _write(self, path: Path, data: bytes) -> None:
        if path.exists():
            return  # another thread or process was faster
        total = self._known_total() + len(data)
        if total > self._limit:
            total = self._make_room(len(data)) + len(data)
        self._total.write_text(
            str(total)
        )  # before the file: a kill in between counts too much, never too little
        path.parent.mkdir(exist_ok=True)
        draft = path.with_suffix(".tmp")  # only ever written under the lock
        draft.write_bytes(data)
        draft.replace(path)

    def _known_total(self) -> int:
        try:
            total = int(read_regular(self._total)[:_DIGITS])
        except (OSError, ValueError):
            total = -1
        return total if total >= 0 else sum(size for _, size, _ in self._files())

    def _make_room(self, needed: int) -> int:
        """Remove the files used longest ago, and drafts of killed processes; returns the bytes that stay."""
        files = sorted(self._files())
        total = sum(size for _, size, _ in files)
        for _, size, path in files:
            if total + needed <= max(needed, _KEPT_SHARE * self._limit):
                break
            path.unlink(missing_ok=True)
            total -= size
        return total

    def _files(self) -> Iterator[tuple[int, int, Path]]:
        """(last use in ns, bytes, path) of every file kept; drafts are as old as can be."""
        for path in self.folder.glob("??/*"):
            with suppress(FileNotFoundError):
                stat = path.stat()
                yield 0 if path.suffix == ".tmp" else stat.st_mtime_ns, stat.st_size, path
