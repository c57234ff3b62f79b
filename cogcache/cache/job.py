"""One shard being filled by this process."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from types import TracebackType

from cogcache.cache.files import FileLock
from cogcache.cache.folder import SeriesFolder, after
from cogcache.cache.format import Entry
from cogcache.cache.journal import MAX_REASON, Journal
from cogcache.cache.shard import ShardWriter
from cogcache.cache.stored import Contents

__all__ = ["ShardJob"]


class ShardJob:
    """A claimed shard. Use it as a context manager; leaving it always gives the claim back.

    Attributes:
        name: Shard name without suffix.
        series: Name of its series.
        planned: All keys planned for the shard, done or not, wanted or not, in order.
        remaining: Keys to do when the job began, in the order in which they must be appended. May be empty:
            then the shard only waits for :meth:`finish`.

    Any thread may call any method; entries must come in order all the same.
    """

    def __init__(
        self,
        name: str,
        folder: SeriesFolder,
        wanted: Collection[str],
        claim: FileLock,
        cache_lock: Callable[[], AbstractContextManager[object]],
        journal: Journal,
        committed: Callable[[SeriesFolder, str], None] | None = None,
    ) -> None:
        self.name, self.series = name, folder.series
        self._folder, self._claim, self._cache_lock, self._journal = folder, claim, cache_lock, journal
        self._committed = committed
        self._shard: ShardWriter = folder.open_shard(name)
        self.planned = folder.plan(name)
        self.remaining = tuple(k for k in after(self.planned, self._shard.keys) if k in wanted)
        self._turn = threading.RLock()
        self._next = 0
        self._settled: set[str] = set()
        self._broken = False
        self.open = True

    def append(self, entry: Entry) -> None:
        """Add an entry; durable on return.

        Raises:
            ValueError: if its key is not among those remaining, or out of their order.
            StorageError: if it cannot be written; the job is then of no more use, its entries stay.
        """
        self._add(entry.key, lambda: self._shard.append(entry))

    def copy(self, key: str, contents: Contents) -> None:
        """:meth:`append` for an entry as :meth:`CacheReader.contents` gave it, byte for byte."""
        self._add(key, lambda: self._shard.copy(key, contents))

    def _add(self, key: str, write: Callable[[], None]) -> None:
        with self._turn:
            try:
                place = self.remaining.index(key, self._next)
            except ValueError:
                raise ValueError(f"{key} is not the turn of shard {self.name}") from None
            self._check_usable()
            self._broken = True
            write()
            self._broken = False
            self._next = place + 1
            self._settled.add(key)

    def fail(self, key: str, source: str, reason: str) -> None:
        """Record in the journal why an entry cannot be made; it is planned anew in the next run."""
        self._journal.add(
            "failed", series=self.series, shard=self.name, key=key, source=source, reason=reason[:MAX_REASON]
        )
        self._settled.add(key)

    def finish(self) -> None:
        """Commit the shard. One without a single entry leaves no files.

        Raises:
            ValueError: if a remaining key was neither appended nor failed.
            StorageError: if it cannot be written; a later run finishes it.
        """
        with self._turn:
            self._check_usable()
            forgotten = [key for key in self.remaining if key not in self._settled]
            if forgotten:
                raise ValueError(f"shard {self.name}: {forgotten[0]} was neither appended nor failed")
            self._broken = True
            entries = len(self._shard.keys)
            self._commit(entries)
            self.close()
        if entries:
            self._journal.add("committed", series=self.series, shard=self.name, entries=entries)
            if self._committed is not None:
                self._committed(self._folder, self.name)

    def _commit(self, entries: int) -> None:
        if entries:
            self._shard.seal()
        with self._cache_lock():
            if entries:
                self._shard.commit()
            else:
                self._shard.discard()
            self._folder.drop_plan(self.name)

    def _check_usable(self) -> None:
        if self._broken or not self.open:
            raise ValueError(f"shard {self.name} is closed, or an error has ended it")

    def close(self) -> None:
        """Give the claim back; what is durable stays. Twice does no harm."""
        with self._turn:
            self.open = False
            self._shard.close()
            self._claim.release()

    def __enter__(self) -> ShardJob:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
