"""Writing a cache to a server, which has neither locks nor renames: it is made in a folder here, and sent as committed.

The folder, the *staging*, is a cache like any other, so every rule of the writer holds there. What is committed is sent
in an order that leaves the cache on the server at every instant as it was, or as it will be. A shard that has arrived
is removed from the staging but for its index and a file ``<shard>.pushed``, which stands for the data.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from cogcache.cache.backend import backend_of
from cogcache.cache.files import make_folder, remove, write_atomic
from cogcache.cache.folder import SeriesFolder
from cogcache.cache.format import IDENTITY_FILE, JOURNAL_FILE, MANIFEST_FILE, Identity, Manifest
from cogcache.cache.identity import admit, read_identity
from cogcache.cache.index import parse_index
from cogcache.cache.lines import load_sealed
from cogcache.cache.lock import cache_lock
from cogcache.cache.remote.connection import Connection
from cogcache.cache.remote.lru import default_folder
from cogcache.cache.remote.storage import RemoteOptions
from cogcache.cache.storage import LocalStorage
from cogcache.cache.tables import pending, read_manifest
from cogcache.errors import CacheError, ConfigError, DamagedCacheError
from cogcache.location import Url
from cogcache.progress import say

__all__ = ["Mirror", "staging_folder"]

SETTINGS_FILE = "encode.config.yaml"


def staging_folder(url: Url, given: Path | None = None) -> Path:
    """Where a cache for ``url`` is made: ``given``, or a folder of its own in the user's cache folder."""
    name = f"{url.name}-{hashlib.sha256(str(url).encode()).hexdigest()[:12]}"
    return given or default_folder().with_name("staging") / name


class Mirror:
    """What keeps the cache at ``url`` up to date with its staging folder.

    Raises:
        ConfigError: if nothing can be written to such a URL.
        CacheError: if a package is missing.
    """

    def __init__(self, url: Url, root: Path, patience: float = RemoteOptions.patience) -> None:
        if url.protocol in ("http", "https"):
            raise ConfigError(
                f"{url} can only be read.",
                "Encode to a folder and copy it to the server, or give s3://, gs:// or hf://.",
            )
        self._url, self._root = url, root.absolute()
        self._server = Connection(url, patience)
        self._identity_sent = b""

    # What the server has -------------------------------------------------------------------------------------------

    def pull(self) -> None:
        """Let the staging know every shard that the server has, so that nothing there is made again.

        Raises:
            MismatchError: if the cache there was made with other settings than the staging.
            CacheError: if both hold a shard of one name and they differ.
        """
        data = self._read(IDENTITY_FILE)
        if data is None and not (self._root / IDENTITY_FILE).exists():
            return
        make_folder(self._root)
        with cache_lock(self._root):
            if data is not None:
                admit(self._root, self._identity(data))
            identity = read_identity(self._root)
            for series in identity.series:
                self._pull_series(SeriesFolder(self._root, identity, series))
            if not (self._root / MANIFEST_FILE).exists():
                self._pull_tables()

    def _identity(self, data: bytes) -> Identity:
        try:
            return Identity.model_validate(load_sealed(data))
        except ValueError as error:
            raise DamagedCacheError(
                f"{self._url / IDENTITY_FILE} is damaged: {error}.", "Choose another URL."
            ) from None

    def _read(self, name: str) -> bytes | None:
        try:
            return self._server.read(name)
        except FileNotFoundError:
            return None

    def _pull_series(self, folder: SeriesFolder) -> None:
        suffix = ".index.jsonl"
        there = {n.removesuffix(suffix) for n in self._server.names(folder.series) if n.endswith(suffix)}
        here = set(folder.committed())
        for name in sorted(there - here):
            self._pull_shard(folder, name)
        for name in sorted(here & there):
            if not folder.pushed(name).exists():
                self._check_same_index(folder, name)
        for name in sorted(here - there):
            if folder.pushed(name).exists():  # sent once, and gone from there: it must be made again
                remove(folder.path / f"{name}{suffix}", folder.pushed(name))

    def _pull_shard(self, folder: SeriesFolder, name: str) -> None:
        file = f"{folder.series}/{name}.index.jsonl"
        if name in folder.unfinished():
            raise self._conflict(f"{folder.series}/{name}")
        data = self._server.read(file)
        try:
            size = parse_index(data).bytes
        except ValueError as error:
            raise DamagedCacheError(f"{self._url / file} is damaged: {error}.", "Delete it there.") from None
        if self._server.size(self._data_name(folder, name)) == size:
            self._pull_side_file(folder, name)
            write_atomic(folder.pushed(name), b"%d\n" % size)
            write_atomic(folder.path / f"{name}.index.jsonl", data)

    def _pull_side_file(self, folder: SeriesFolder, name: str) -> None:
        """What tells what further shards of its array must be like. Whoever reads it checks it."""
        path = folder.side_file(name)
        data = None if path is None or path.exists() else self._read(self._name(path))
        if path is not None and data is not None:
            make_folder(path.parent)
            write_atomic(path, data)

    def _check_same_index(self, folder: SeriesFolder, name: str) -> None:
        file = f"{folder.series}/{name}.index.jsonl"
        if self._read(file) not in (None, (self._root / file).read_bytes()):
            raise self._conflict(f"{folder.series}/{name}")

    def _conflict(self, shard: str) -> CacheError:
        return CacheError(
            f"{shard} is not the same in {self._url} and in {self._root}: two runs have written there.",
            f"Delete {self._root} and run again: what {self._url} has is kept, the rest is made again.",
        )

    def _pull_tables(self) -> None:
        """Manifest and tables, where the cache there is finished: from them comes what a dry run compares with."""
        data = self._read(MANIFEST_FILE)
        if data is None:
            return
        write_atomic(self._root / MANIFEST_FILE, data)
        for name, record in read_manifest(LocalStorage(self._root)).tables.items():
            for candidate in (name, pending(name)):
                table = self._read(candidate)
                if table is not None and hashlib.sha256(table).hexdigest() == record.sha256:
                    write_atomic(self._root / name, table)
                    break
        journal = self._read(JOURNAL_FILE)
        if journal is not None and not (self._root / JOURNAL_FILE).exists():
            write_atomic(self._root / JOURNAL_FILE, journal)

    # What it gets --------------------------------------------------------------------------------------------------

    def send_shard(self, folder: SeriesFolder, name: str) -> None:
        """Send a committed shard: its index last, which commits it there. Does nothing if it is there."""
        if folder.pushed(name).exists():
            return
        self._send_identity()
        self._check_same_index(folder, name)
        data, size = folder.data(name), folder.index(name).bytes
        try:
            self._server.upload(data, self._data_name(folder, name))
            side = folder.side_file(name)
            if side is not None:
                self._server.upload(side.read_bytes(), self._name(side))
            index = folder.path / f"{name}.index.jsonl"
            self._server.upload(index.read_bytes(), f"{folder.series}/{index.name}")
        except FileNotFoundError:
            if folder.pushed(name).exists():  # another process of this staging was faster
                return
            raise
        write_atomic(folder.pushed(name), b"%d\n" % size)
        remove(data)

    def send_cache(self, manifest: Manifest) -> None:
        """Send what makes the cache whole: missing shards, tables, and the manifest, which commits it there."""
        identity = read_identity(self._root)
        for series in manifest.series:
            folder = SeriesFolder(self._root, identity, series)
            for name in folder.committed():
                self.send_shard(folder, name)
        self._send_identity()
        self._send_side_files(identity, manifest)
        data, tables = (self._root / MANIFEST_FILE).read_bytes(), sorted(manifest.tables)
        there = self._server.names("")
        if self._read(MANIFEST_FILE) == data and not any(pending(name) in there for name in tables):
            return
        for name in tables:
            self._server.upload(self._root / name, pending(name))
        for name in (JOURNAL_FILE, SETTINGS_FILE):
            if (self._root / name).exists():
                self._server.upload(self._root / name, name)
        self._server.upload(data, MANIFEST_FILE)
        for name in tables:
            self._server.upload(self._root / name, name)
        for name in tables:
            self._server.remove(pending(name))
        say(f"{self._url} is up to date.")

    def _send_side_files(self, identity: Identity, manifest: Manifest) -> None:
        """What tells other programs of the shards, where it is not there yet."""
        folders = {series: SeriesFolder(self._root, identity, series) for series in manifest.series}
        shards = {
            series: {name: folder.index(name) for name in folder.committed()}
            for series, folder in folders.items()
        }
        for name, data in backend_of(identity.backend).side_files(self._root, identity, shards).items():
            if self._read(name) != data:
                self._server.upload(data, name)

    def drop(self, series: str) -> None:
        """Remove a series from the server, its manifest first: until the next commit the cache is unfinished."""
        self._server.remove(MANIFEST_FILE)
        for name in sorted(self._server.tree(series), key=lambda name: not name.endswith(".index.jsonl")):
            self._server.remove(name)

    def _send_identity(self) -> None:
        data = (self._root / IDENTITY_FILE).read_bytes()
        if data != self._identity_sent:
            if self._read(IDENTITY_FILE) != data:
                self._server.upload(data, IDENTITY_FILE)
            self._identity_sent = data

    def _data_name(self, folder: SeriesFolder, name: str) -> str:
        return self._name(folder.data(name))

    def _name(self, path: Path) -> str:
        """On the server, of a file of the staging."""
        return path.relative_to(self._root).as_posix()
