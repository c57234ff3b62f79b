"""What a reader needs of the place where a cache is: small files, sizes, and ranges of bytes.

Names are relative to the cache, with ``/``, and never come from a file unchecked (:mod:`cogcache.cache.names`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from cogcache.cache.checksum import crc32
from cogcache.cache.handles import Handles
from cogcache.cache.index import Member
from cogcache.cache.regular import read_regular
from cogcache.cache.tensors import Buffer
from cogcache.location import Location

__all__ = ["LocalStorage", "Storage", "checked"]


class Storage(Protocol):
    """One cache's files. Thread-safe; survives fork and pickling.

    Attributes:
        root: Folder or URL of the cache.
        parallel: How many files are best asked for at once.
    """

    root: Location
    parallel: int

    def read(self, name: str, sha256: str = "") -> bytes:
        """A small file, whole.

        Args:
            sha256: Hash that it should have, where known: a copy kept on this machine may then be used. The
                caller checks what comes all the same.

        Raises:
            FileNotFoundError: if there is none.
            OSError: if it cannot be read.
        """

    def size(self, name: str) -> int | None:
        """Bytes of a file; None where there is none, or what is there is no regular file."""

    def pread(self, name: str, offset: int, size: int) -> Buffer:
        """Up to ``size`` bytes from ``offset``; fewer only at the end of the file.

        Raises:
            OSError: if it cannot be read.
        """

    def members(self, name: str, version: str, members: Sequence[Member]) -> list[Buffer]:
        """The contents of members of a data file, each whole and with the right CRC-32.

        Args:
            version: sha256 of the data file: what was read once may be kept under it.

        Raises:
            ValueError: naming the member whose bytes are others.
            OSError: if it cannot be read.
        """


class LocalStorage:
    """A folder of this machine. Files that are read by offset stay open."""

    parallel = 1

    def __init__(self, root: Path) -> None:
        self.root: Location = root
        self._folder, self._handles = root, Handles()
        self._prefix = f"{root}/"

    def read(self, name: str, sha256: str = "") -> bytes:
        """As :meth:`Storage.read`."""
        _ = sha256
        return read_regular(self._folder / name)

    def size(self, name: str) -> int | None:
        """As :meth:`Storage.size`."""
        path = self._folder / name
        return path.stat().st_size if path.is_file() else None

    def pread(self, name: str, offset: int, size: int) -> Buffer:
        """As :meth:`Storage.pread`."""
        return self._handles.pread(self._prefix + name, offset, size)

    def members(self, name: str, version: str, members: Sequence[Member]) -> list[Buffer]:
        """As :meth:`Storage.members`: one ``pread`` each."""
        _ = version
        return [checked(member, self.pread(name, member[1], member[2])) for member in members]


def checked(member: Member, data: Buffer) -> Buffer:
    """``data`` if these are all bytes of the member.

    Raises:
        ValueError: if not.
    """
    name, _, size, checksum = member
    if len(data) != size or crc32(data) != checksum:
        raise ValueError(f"member {name} does not match its checksum")
    return data
