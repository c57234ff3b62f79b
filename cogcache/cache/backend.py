"""What a shard backend must provide: two small protocols, one per direction.

Planning, claiming, committing tables and the manifest know nothing of how a shard stores its entries; a
backend knows nothing of plans and manifests. A backend owns the files of one shard name in the series
folder: while open for writing, names ending in ``.part``; once committed, its data and its index.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

from cogcache.cache.format import Entry, ShardRecord

__all__ = ["ShardReader", "ShardWriter"]


class ShardWriter(Protocol):
    """One shard being filled. Opening it takes up whatever a killed process left, or begins anew.

    Only the holder of the shard's lock may open it. After any error it must be closed and opened again.
    """

    @property
    def keys(self) -> tuple[str, ...]:
        """Keys of the entries that are durable, in the order they were appended."""

    def append(self, entry: Entry) -> None:
        """Add an entry; durable on return."""

    def copy(self, key: str, contents: tuple[bytes, bytes]) -> None:
        """:meth:`append` for an entry as it is stored: the bytes of its tensors and of its facts."""

    def seal(self) -> None:
        """Do the slow part of finishing: all bytes of the shard durable, nothing committed yet."""

    def commit(self) -> ShardRecord:
        """Commit the sealed shard; the caller holds the cache lock."""

    def discard(self) -> None:
        """Remove an empty shard's files; the caller holds the cache lock."""

    def close(self) -> None:
        """Close files; what is durable stays. Twice does no harm."""


class ShardReader(Protocol):
    """One committed shard. Thread-safe; survives fork and pickling."""

    @property
    def name(self) -> str:
        """Shard name without suffix."""

    def __iter__(self) -> Iterator[str]:
        """Keys of all entries, in shard order."""

    def read(self, key: str) -> Entry:
        """Read one entry and check every byte of it against its checksum."""

    def contents(self, key: str) -> tuple[bytes, bytes]:
        """An entry as it is stored, checked: the bytes of its tensors and of its facts."""

    def facts(self, key: str) -> dict[str, Any]:
        """The facts of an entry, checked, without reading its tensors."""

    def verify(self) -> None:
        """Read the whole shard and check it against the manifest's hash."""
