"""Filling a cache: plan shards, fill them in any number of processes, commit the whole.

How a run uses it::

    writer = CacheWriter.open(root, identity)
    writer.plan("latents", keys, entries_per_shard)
    for job in writer.jobs("latents", keys):
        with job:
            for key in job.remaining:
                job.append(Entry(key, tensors, facts))  # or job.fail(key, source, reason)
            job.finish()
    writer.commit(samples, failures, unconditional)

A kill at any moment costs at most the entry in the making. ``shards/README.md`` is the specification.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import NamedTuple, Protocol
from weakref import WeakSet

from cogcache.cache import tables
from cogcache.cache.backend import backend_of
from cogcache.cache.files import make_folder, storage_errors, write_atomic
from cogcache.cache.folder import SeriesFolder
from cogcache.cache.format import (
    JOURNAL_FILE,
    FailureRecord,
    Identity,
    Manifest,
    SampleRecord,
    SeriesRecord,
    ValidationRecord,
    ZarrCompression,
)
from cogcache.cache.identity import admit
from cogcache.cache.index import check_key
from cogcache.cache.job import ShardJob
from cogcache.cache.journal import Journal
from cogcache.cache.lock import cache_lock
from cogcache.cache.needs import check_complete
from cogcache.errors import CacheError

__all__ = ["CacheWriter", "Left", "ShardJob"]


class Left(NamedTuple):
    """Shards that are not committed.

    Attributes:
        busy: Whether others fill some of them.
        free: Series with shards that nobody fills and that hold or await wanted entries.
    """

    busy: bool
    free: frozenset[str]


class Copy(Protocol):
    """Where what is committed is sent to as well (:class:`cogcache.cache.remote.mirror.Mirror`)."""

    def send_shard(self, folder: SeriesFolder, name: str) -> None:
        """Called for every shard, once it is committed."""

    def send_cache(self, manifest: Manifest) -> None:
        """Called under the cache lock, once tables and manifest are committed."""


class CacheWriter:
    """One process's access to a cache that is being filled. Safe beside other processes and threads."""

    def __init__(
        self,
        root: Path,
        identity: Identity,
        compression: ZarrCompression = "zstd",
        copy: Copy | None = None,
    ) -> None:
        """Use :meth:`open`."""
        self._copy = copy
        self.root = root
        self.identity = identity
        self.journal = Journal(root / JOURNAL_FILE)
        self._held: WeakSet[ShardJob] = WeakSet()
        self._folders = {
            series: SeriesFolder(root, identity, series, compression) for series in identity.series
        }

    @classmethod
    def open(
        cls,
        root: Path,
        identity: Identity,
        compression: ZarrCompression = "zstd",
        copy: Copy | None = None,
    ) -> CacheWriter:
        """Create the cache in ``root``, or take up the one that is there.

        A series that the cache does not have yet is added. Another ``model.id`` is accepted where all facts
        of the model and all fingerprints agree: the folder has moved.

        Args:
            compression: Of new zarr arrays; tar shards have none.
            copy: Told of everything that is committed.

        Raises:
            MismatchError: if it was made with other settings; lists every field as "was / is".
            DamagedCacheError: if ``cache.json`` cannot be trusted.
            StorageError: if the folder cannot be written.
        """
        root = root.absolute()
        make_folder(root)
        with cache_lock(root):
            writer = cls(root, admit(root, identity), compression, copy)
            writer._write_side_files(())
            return writer

    def refresh(self) -> None:
        """Bring the files that tell other programs of the cache in step with its committed shards."""
        with self._lock():
            self._write_side_files()

    def _write_side_files(self, series: Collection[str] | None = None) -> None:
        """Those that are not as they must be, of all shards or of those of some series; under the cache lock."""
        shards = {
            name: {shard: folder.index(shard) for shard in folder.committed()}
            for name, folder in self._folders.items()
            if series is None or name in series
        }
        for name, data in (
            backend_of(self.identity.backend).side_files(self.root, self.identity, shards).items()
        ):
            path = self.root / name
            if not path.is_file() or path.read_bytes() != data:
                write_atomic(path, data)

    def _lock(self) -> AbstractContextManager[None]:
        return cache_lock(self.root)

    def _folder(self, series: str) -> SeriesFolder:
        if series not in self._folders:
            raise CacheError(f"{self.root} has no series {series!r}.")
        return self._folders[series]

    def committed(self, series: str) -> set[str]:
        """Keys of all entries that are durable now, in committed shards and in unfinished ones."""
        with self._lock():
            return self._folder(series).durable_keys()

    def usable(self, series: str) -> set[str]:
        """Keys of all entries in committed shards: those that samples may name."""
        with self._lock():
            return self._folder(series).committed_keys()

    def plan(self, series: str, keys: Sequence[str], entries_per_shard: int, group: str = "") -> None:
        """Decide which shards get those of ``keys`` that are neither durable nor planned already.

        New shards take them in the order given, ``entries_per_shard`` each; repeated keys count once.

        Args:
            group: Shape that these entries share, ``"49x480x720"``, part of their shards' names; empty for any.

        Raises:
            ValueError: if a key is not 32 hex digits or ``entries_per_shard`` is below 1.
        """
        if entries_per_shard < 1:
            raise ValueError(f"a shard cannot hold {entries_per_shard} entries")
        wanted = dict.fromkeys(check_key(key) for key in keys)
        folder = self._folder(series)
        with self._lock():
            folder.sweep()
            settled = folder.settled_keys()
            missing = [key for key in wanted if key not in settled]
            made = folder.add_plans(missing, entries_per_shard, group)
        for name, entries in made.items():
            self.journal.add("planned", series=series, shard=name, entries=entries)

    def jobs(self, series: str, wanted: Collection[str]) -> Iterator[ShardJob]:
        """Claim unfinished shards that hold or await any of ``wanted``, oldest first.

        ``wanted`` are all keys that this run can make, done or not: planned keys that are not among them
        are left out of their shard. Shards that other processes hold are skipped; see :meth:`busy`.

        A job stays claimed until it is finished, closed or forgotten, so work on the next may begin before. Closing the
        iterator before its end, as an exception in its loop does, closes its unfinished jobs; what they hold
        stays.
        """
        wanted = frozenset(wanted)
        given: list[ShardJob] = []
        while (job := self._claim_next(series, wanted, given)) is not None:
            given.append(job)
            try:
                yield job
            except BaseException:
                for unfinished in given:
                    unfinished.close()
                raise

    def _claim_next(self, series: str, wanted: frozenset[str], given: Sequence[ShardJob]) -> ShardJob | None:
        folder = self._folder(series)
        tried = {job.name for job in given}
        with self._lock():
            for name in folder.unfinished():
                if name in tried or folder.plan_is_foreign(name, wanted):
                    continue
                claim = folder.claim(name)
                if claim is not None:
                    break
            else:
                return None
        with storage_errors(folder.path), ExitStack() as undo:
            undo.callback(claim.release)
            job = ShardJob(
                name,
                folder,
                wanted,
                claim,
                self._lock,
                self.journal,
                self._copy.send_shard if self._copy else None,
            )
            undo.pop_all()
        self._held.add(job)
        return job

    def busy(self) -> bool:
        """Whether other processes (or other writers of this one) are filling shards of this cache."""
        return self.left({}).busy

    def left(self, wanted: Mapping[str, Collection[str]]) -> Left:
        """What is still to be done by others, and what by whoever takes it, at one instant.

        Args:
            wanted: Series -> all keys that this run can make, done or not.
        """
        mine = {(job.series, job.name) for job in self._held if job.open}
        keys = {series: frozenset(some) for series, some in wanted.items()}
        busy, free = False, set()
        with self._lock():
            for series, folder in self._folders.items():
                for name in folder.unfinished():
                    if (series, name) in mine:
                        continue
                    if folder.is_claimed(name):
                        busy = True
                    elif not folder.plan_is_foreign(name, keys.get(series, frozenset())):
                        free.add(series)
        return Left(busy, frozenset(free))

    def failures(self) -> dict[str, str]:
        """Entry key -> reason recorded last, for every entry that failed once and is still missing."""
        durable = {series: self.committed(series) for series in self._folders}
        return {
            key: reason
            for (series, key), reason in self.journal.reasons().items()
            if series in durable and key not in durable[series]
        }

    def commit(
        self,
        samples: Iterable[SampleRecord],
        failures: Iterable[FailureRecord],
        unconditional: str,
        validation: Sequence[ValidationRecord] | None = None,
    ) -> Manifest:
        """Write the tables, then the manifest: from here on the cache can be trained from.

        Rows are sorted by id, shards by number, so equal content gives equal bytes. A kill in between leaves
        the cache as it was, or committed.

        Args:
            samples: Every sample of the cache.
            failures: Every clip that is not in it, with the reason.
            unconditional: Text key of the empty caption.
            validation: Prompts for validation, in order; None keeps those that are committed.

        Raises:
            CacheError: if a sample or prompt needs an entry that is in no committed shard, or an id comes twice.
        """
        rows = sorted(samples, key=lambda row: row.id)
        lost = sorted(failures, key=lambda row: row.id)
        with self._lock():
            keys: dict[str, set[str]] = {}
            series = {}
            for name, folder in sorted(self._folders.items()):
                folder.sweep()
                keys[name] = folder.committed_keys()
                series[name] = SeriesRecord(
                    fingerprint=self.identity.series[name],
                    shards=tuple(folder.index(shard).record(shard) for shard in folder.committed()),
                )
            self._write_side_files()
            prompts = tables.current_validation(self.root) if validation is None else validation
            check_complete(rows, unconditional, prompts, keys)
            manifest = tables.commit_tables(
                self.root, self.identity, series, rows, lost, unconditional, prompts
            )
        self.journal.add("manifest", checksum=manifest.checksum, samples=len(rows), failures=len(lost))
        if self._copy is not None:
            with self._lock():
                self._copy.send_cache(manifest)
        return manifest
