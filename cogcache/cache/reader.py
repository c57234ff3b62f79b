"""Reading a finished cache: everything is checked against the manifest before it is believed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any

from cogcache.cache.backend import backend_of
from cogcache.cache.damage import mend_hint
from cogcache.cache.files import storage_errors
from cogcache.cache.format import (
    FAILURES_FILE,
    LATENTS,
    MANIFEST_FILE,
    SAMPLES_FILE,
    TEXT,
    Entry,
    FailureRecord,
    Manifest,
    SampleRecord,
    SeriesRecord,
    ShardRecord,
    ValidationRecord,
)
from cogcache.cache.index import parse_index
from cogcache.cache.moments import moments_of
from cogcache.cache.names import is_series, parse_shard
from cogcache.cache.needs import needs_of, needs_of_prompt
from cogcache.cache.remote.storage import RemoteOptions, open_storage
from cogcache.cache.shard import ShardReader
from cogcache.cache.storage import Storage
from cogcache.cache.stored import Contents
from cogcache.cache.tables import read_manifest, read_table, read_validation
from cogcache.errors import CacheError, DamagedCacheError
from cogcache.location import Location, parse_location

if TYPE_CHECKING:
    import torch

__all__ = ["CacheReader"]

_TRIES = 3


class CacheReader:
    """A committed cache, open for indexed reads. Thread-safe; survives fork and pickling.

    Opening reads the manifest, the tables and the indexes, and checks each against its hash; shards are
    checked entry by entry as they are read. What a later encode adds is seen by a new reader only.

    Attributes:
        root: Folder or URL of the cache.
        manifest: The checked manifest.
        samples: Rows of ``samples.jsonl``, sorted by id.
        failures: Rows of ``failures.jsonl``.
        validation: Rows of ``validation.jsonl`` in the order of the prompts; none where it is not there.

    Raises:
        CacheError: if there is no cache, or it is not finished.
        DamagedCacheError: if bytes on disk are not those that were committed.
        StorageError: if the disk or its permissions forbid reading.
    """

    def __init__(self, root: Location | str, remote: RemoteOptions | None = None) -> None:
        self._storage: Storage = open_storage(parse_location(root), remote)
        self.root: Location = self._storage.root
        with storage_errors(self.root, "read"):
            self._open()
            self._entries = {
                name: self._open_series(name, series) for name, series in self.manifest.series.items()
            }
        self._check_references()

    def _open(self) -> None:
        """Manifest and tables; again if another process has just committed in between."""
        for attempt in range(_TRIES):
            self.manifest: Manifest = read_manifest(self._storage)
            try:
                self.samples = read_table(self._storage, self.manifest, SAMPLES_FILE, SampleRecord)
                self.failures = read_table(self._storage, self.manifest, FAILURES_FILE, FailureRecord)
                self.validation: list[ValidationRecord] = read_validation(self._storage, self.manifest)
                return
            except DamagedCacheError:
                if attempt == _TRIES - 1 or read_manifest(self._storage) == self.manifest:
                    raise

    def _open_series(self, name: str, series: SeriesRecord) -> dict[str, ShardReader]:
        if not is_series(name):
            raise self._damaged(f"{name!r:.80} is not a name for a series")
        found: dict[str, ShardReader] = {}
        for shard in self._each(partial(self._open_shard, name), series.shards):
            for key in shard:
                if found.setdefault(key, shard) is not shard:
                    raise self._damaged(f"entry {key} is in two shards of {name}")
        return found

    def _each(
        self, function: Callable[[ShardRecord], ShardReader], records: Sequence[ShardRecord]
    ) -> Iterable[ShardReader]:
        """``map``, with as many at once as the storage likes."""
        if self._storage.parallel == 1:
            return map(function, records)
        with ThreadPoolExecutor(self._storage.parallel) as pool:
            return list(pool.map(function, records))

    def _open_shard(self, series: str, record: ShardRecord) -> ShardReader:
        try:
            parse_shard(record.name, series)
        except ValueError as error:
            raise self._damaged(str(error)) from None
        name = f"{series}/{record.name}.index.jsonl"
        try:
            index = parse_index(self._storage.read(name, record.index_sha256))
            if index.record(record.name) != record:
                raise ValueError("it is not the one that the manifest names")
        except (OSError, ValueError) as error:
            raise DamagedCacheError(
                f"{self.root / name} is missing or damaged: {error}.",
                mend_hint(self.root / series, record.name),
            ) from None
        return ShardReader(self._storage, series, record.name, index, backend_of(self.manifest.backend))

    def _check_references(self) -> None:
        needs = [need for row in self.samples for need in needs_of(row)]
        needs += [need for prompt in self.validation for need in needs_of_prompt(prompt)]
        for series, key in (*needs, (TEXT, self.manifest.unconditional)):
            self._shard(series, key)

    def _shard(self, series: str, key: str) -> ShardReader:
        try:
            return self._entries[series][key]
        except KeyError:
            raise CacheError(f"{self.root} has no entry {key!r:.80} in {series!r:.80}.") from None

    def read(self, series: str, key: str) -> Entry:
        """Read one entry; every byte is checked against its checksum.

        Raises:
            CacheError: if there is no such entry.
            DamagedCacheError: if its bytes are not those that were committed.
        """
        return self._shard(series, key).read(key)

    def moments(self, key: str) -> torch.Tensor:
        """Posterior moments [2C, F, H, W] of a latent, mean then log-variance, unscaled.

        In the VAE's dtype; float32 where the cache keeps log-variances in 8 bits. Raises as :meth:`read` does.
        """
        tensors = self.read(LATENTS, key).tensors
        try:
            return moments_of(tensors, self.manifest.series[LATENTS].fingerprint.get("vae_dtype"))
        except ValueError as error:
            raise self._damaged(f"entry {key} of latents is none: {error}") from None

    def facts(self, series: str, key: str) -> dict[str, Any]:
        """The facts of one entry; its tensors are not read. Raises as :meth:`read` does."""
        return self._shard(series, key).facts(key)

    def contents(self, series: str, key: str) -> Contents:
        """One entry as bytes, as :mod:`cogcache.cache.stored` spells them. Raises as :meth:`read` does."""
        return self._shard(series, key).contents(key)

    def groups(self, series: str) -> dict[str, list[str]]:
        """Keys of all entries of a series by the group of their shard, in shard order; used by a sample or not."""
        found: dict[str, list[str]] = {}
        for key, shard in self._entries.get(series, {}).items():
            found.setdefault(parse_shard(shard.name).group_text, []).append(key)
        return found

    def keys(self, series: str) -> list[str]:
        """Keys of all entries of a series, in shard order; used by a sample or not."""
        return list(self._entries.get(series, ()))

    def damages(self) -> list[DamagedCacheError]:
        """Read every shard whole and check it against the manifest's hash; empty if all is well."""
        found = []
        for shard in dict.fromkeys(shard for series in self._entries.values() for shard in series.values()):
            try:
                shard.verify()
            except DamagedCacheError as error:
                found.append(error)
        return found

    def _damaged(self, what: str) -> DamagedCacheError:
        return DamagedCacheError(
            f"{self.root / MANIFEST_FILE} is damaged: {what}.", "Run encode again: it writes this anew."
        )
