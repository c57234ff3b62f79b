"""A cache on a server, read through fsspec: ranges by the index, kept on this machine, asked for until they come."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cogcache.cache.index import Member
from cogcache.cache.remote.connection import Connection
from cogcache.cache.remote.lru import DEFAULT_BYTES, Lru, default_folder
from cogcache.cache.storage import LocalStorage, Storage, checked
from cogcache.cache.tensors import Buffer
from cogcache.location import Location, Url

__all__ = ["RemoteOptions", "RemoteStorage", "open_storage"]

_GAP = 1 << 16
"""Members with at most so many bytes between them are fetched in one request."""

_TRIES = 2
"""Bytes that come back wrong are asked for once more before they count as damaged."""


@dataclass(frozen=True)
class RemoteOptions:
    """How a cache at a URL is used.

    Args:
        folder: What is fetched is kept here; None for :func:`~cogcache.cache.remote.lru.default_folder`.
        limit: Bytes kept at most; 0 keeps nothing.
        patience: Seconds to wait for a server that does not answer any more; one that never did gets half a minute.
    """

    folder: Path | None = None
    limit: int = DEFAULT_BYTES
    patience: float = 600.0


def open_storage(root: Location, options: RemoteOptions | None = None) -> Storage:
    """The storage for a folder or URL; nothing is read yet."""
    if isinstance(root, Url):
        return RemoteStorage(root, options or RemoteOptions())
    return LocalStorage(root.absolute())


class RemoteStorage:
    """A folder of a server."""

    parallel = 16

    def __init__(self, root: Url, options: RemoteOptions) -> None:
        self.root: Location = root
        self._url, self._options = root, options
        self._start(known=False)

    def _start(self, known: bool) -> None:
        self._lru = Lru(self._options.folder or default_folder(), self._options.limit)
        self._lock = threading.Lock()
        self._connection: Connection | None = None
        self._process = os.getpid()
        self._was_known = known

    def __getstate__(self) -> tuple[Url, RemoteOptions, bool]:
        return self._url, self._options, self._known

    def __setstate__(self, state: tuple[Url, RemoteOptions, bool]) -> None:
        self._url, self._options, known = state
        self.root = self._url
        self._start(known)

    @property
    def _known(self) -> bool:
        """Whether the server has answered, here or where this was copied from."""
        return self._was_known or (self._connection is not None and self._connection.known)

    @property
    def connection(self) -> Connection:
        """Of this process: neither the library's event loop nor its sockets survive a fork."""
        if self._process != os.getpid():
            self._start(self._known)
        with self._lock:
            if self._connection is None:
                self._connection = Connection(self._url, self._options.patience, self._was_known)
            return self._connection

    def read(self, name: str, sha256: str = "") -> bytes:
        """As :meth:`Storage.read`."""
        kept = self._lru.get(sha256) if sha256 else None
        if kept is not None and _sha256(kept) == sha256:
            return kept
        data = self.connection.read(name)
        if sha256 and _sha256(data) == sha256:
            self._lru.drop(sha256)
            self._lru.put(sha256, data)
        return data

    def size(self, name: str) -> int | None:
        """As :meth:`Storage.size`."""
        return self.connection.size(name)

    def pread(self, name: str, offset: int, size: int) -> bytes:
        """As :meth:`Storage.pread`. Not kept."""
        return self.connection.fetch(name, offset, size)

    def members(self, name: str, version: str, members: Sequence[Member]) -> list[Buffer]:
        """As :meth:`Storage.members`: one request where they lie side by side."""
        start = members[0][1]
        size = max(offset + length for _, offset, length, _ in members) - start
        if size - sum(member[2] for member in members) > _GAP * len(members):
            return [self.members(name, version, [member])[0] for member in members]
        key = f"{version} {start} {size}"
        kept = self._lru.get(key, size)
        if kept is not None:
            try:
                return _cut(kept, start, members)
            except ValueError:
                self._lru.drop(key)
        for _ in range(_TRIES - 1):
            try:
                return self._fetch(key, name, start, size, members)
            except ValueError:
                continue
        return self._fetch(key, name, start, size, members)

    def _fetch(self, key: str, name: str, start: int, size: int, members: Sequence[Member]) -> list[Buffer]:
        data = self.connection.fetch(name, start, size)
        parts = _cut(data, start, members)
        self._lru.put(key, data)
        return parts


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _cut(data: bytes, start: int, members: Sequence[Member]) -> list[Buffer]:
    return [checked(member, data[member[1] - start : member[1] - start + member[2]]) for member in members]
