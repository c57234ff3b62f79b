"""One shard, whatever its backend: appended to durably, committed, recovered, and read by offset."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from cogcache.cache.backend import PART, Backend, Layout
from cogcache.cache.damage import mend_hint
from cogcache.cache.files import (
    AppendFile,
    make_folder,
    remove,
    rename,
    storage_errors,
    sync_folder,
    write_atomic,
)
from cogcache.cache.format import Entry, EntryRecord, ShardRecord
from cogcache.cache.index import Members, ShardIndex, build_index, check_key, parse_index
from cogcache.cache.lines import seal_line, unseal_line
from cogcache.cache.regular import open_regular
from cogcache.cache.storage import Storage
from cogcache.cache.stored import Contents
from cogcache.cache.tensors import Buffer
from cogcache.errors import DamagedCacheError

__all__ = ["ShardReader", "ShardWriter", "durable_keys"]

_MAX_LINE = 1 << 20
_CHUNK = 8 << 20


class ShardWriter:
    """Fills a shard's data file under the name ``.part``; entries are durable by their lines in ``<name>.index.part``.

    Only the holder of the shard's lock may open it. It takes up whatever a killed process left, or begins anew.
    After any error it must be closed and opened again.

    Args:
        folder: Folder of the series.
        name: Shard name without suffix.
        layout: How its entries lie in its data file.
        order: Keys that may come, in the order in which they may.

    Raises:
        StorageError: if the files cannot be written.
    """

    def __init__(self, folder: Path, name: str, layout: Layout, order: Sequence[str]) -> None:
        self._layout, self._file = layout, folder / layout.file
        self._part = self._file.with_name(self._file.name + PART)
        self._index, self._lines = folder / f"{name}.index.jsonl", folder / f"{name}.index.part"
        self.name = name
        if not self._file.parent.exists():
            make_folder(self._file.parent)
        with storage_errors(self._part):
            if self._file.exists():  # killed after the rename, before the index
                rename(self._file, self._part)
            self._records, self._hash, end = _valid_prefix(self._part, self._lines, layout, order)
        kept = b"".join(_line(record) for record in self._records)
        self._data = AppendFile(self._part, end)
        try:
            self._log = AppendFile(self._lines, len(kept))
            if not end:
                self._data.append(layout.head)
                self._hash.update(layout.head)
            for place in dict.fromkeys((self._part.parent, folder)):
                sync_folder(place)
        except BaseException:
            self.close()
            raise

    @property
    def keys(self) -> tuple[str, ...]:
        """Keys of the durable entries, in shard order."""
        return tuple(record.key for record in self._records)

    def append(self, entry: Entry) -> None:
        """Add an entry: first its bytes, then the line that makes them count. Durable on return."""
        self._add(*self._layout.pack(entry, self._data.end))

    def copy(self, key: str, contents: Contents) -> None:
        """:meth:`append` for an entry as bytes, as :mod:`cogcache.cache.stored` spells them."""
        self._add(*self._layout.pack_contents(key, contents, self._data.end))

    def _add(self, data: bytes, record: EntryRecord) -> None:
        self._data.append(data)
        self._log.append(_line(record))
        self._hash.update(data)
        self._records.append(record)

    def seal(self) -> None:
        """Do the slow part of finishing: write the end of the data file. A later :meth:`append` is not possible."""
        end = self._layout.end(self._records)
        self._data.append(end)
        self._hash.update(end)

    def commit(self) -> ShardRecord:
        """Give the sealed shard its name, then write its index, which is the commit mark.

        The caller holds the cache lock.
        """
        self.close()
        index = build_index(self._records, self._data.end, self._hash.hexdigest())
        rename(self._part, self._file)
        self._layout.publish(len(self._records))
        write_atomic(self._index, index)
        remove(self._lines)
        return parse_index(index).record(self.name)

    def discard(self) -> None:
        """Remove the files of a shard without entries; the caller holds the cache lock."""
        self.close()
        remove(self._part, self._lines)

    def close(self) -> None:
        """Close the files; what is durable stays. Twice does no harm."""
        for file in (self.__dict__.get("_data"), self.__dict__.get("_log")):
            if file is not None:
                file.close()


def _line(record: EntryRecord) -> bytes:
    return seal_line(record.model_dump(mode="json"))


def _read_lines(path: Path) -> list[EntryRecord]:
    """Records of the valid lines at the start of an unfinished shard's index."""
    records: list[EntryRecord] = []
    try:
        stream = open_regular(path)
    except FileNotFoundError:
        return records
    with stream:
        while (value := unseal_line(stream.readline(_MAX_LINE))) is not None:
            try:
                record = EntryRecord.model_validate(value)
                check_key(record.key)
            except ValueError:
                break
            records.append(record)
    return records


def durable_keys(folder: Path, name: str, file: str) -> list[str]:
    """Keys of an unfinished shard's entries that are on disk; cheap, so without reading them.

    Args:
        file: Name of its data file when it is committed.
    """
    records = _read_lines(folder / f"{name}.index.part")
    sizes = [p.stat().st_size for p in (folder / f"{file}{PART}", folder / file) if p.exists()]
    there = max(sizes, default=0)
    return [r.key for r in records if all(m.offset + m.size <= there for m in r.members)]


def _valid_prefix(
    part: Path, lines: Path, layout: Layout, order: Sequence[str]
) -> tuple[list[EntryRecord], hashlib._Hash, int]:
    """Longest run of recorded entries whose bytes are really there, the hash and size of those bytes."""
    kept: list[EntryRecord] = []
    places = {key: place for place, key in enumerate(order)}
    last = -1
    try:
        stream: BinaryIO = open_regular(part)
    except FileNotFoundError:
        return kept, hashlib.sha256(), 0
    with stream:
        head = stream.read(len(layout.head))
        if head != layout.head:
            return kept, hashlib.sha256(), 0
        known, end, size = hashlib.sha256(head), len(head), part.stat().st_size
        for record in _read_lines(lines):
            if end + layout.entry_size(record) > size:  # a line decides no amount of memory
                break
            data = stream.read(layout.entry_size(record))
            if places.get(record.key, -1) <= last or not layout.is_entry(record, data, end):
                break
            known.update(data)
            kept.append(record)
            last, end = places[record.key], end + len(data)
    return kept, known, end


class ShardReader:
    """One committed shard, read by offset. Thread-safe; survives fork and pickling.

    Args:
        storage: Where the cache is.
        series: Name of the series.
        name: Shard name without suffix.
        index: Its parsed index.
        backend: How entries are stored.

    Raises:
        DamagedCacheError: if the file is missing, of another size, or has entries of another form.
    """

    def __init__(self, storage: Storage, series: str, name: str, index: ShardIndex, backend: Backend) -> None:
        self.name = name
        self._storage, self._entries, self._backend = storage, index.entries, backend
        self._file = f"{series}/{backend.data_file(name)}"
        self._bytes, self._sha256 = index.bytes, index.sha256
        for key, members in self._entries.items():
            if tuple(member[0] for member in members) != backend.member_names(key):
                raise self._damaged(f"entry {key} has other members than tensors and facts")
        if storage.size(self._file) != self._bytes:
            raise self._damaged("it is missing or its size has changed")

    def __iter__(self) -> Iterator[str]:
        """Keys of all entries, in shard order."""
        return iter(self._entries)

    def read(self, key: str) -> Entry:
        """Read one entry and check the CRC-32 of each member.

        Raises:
            DamagedCacheError: if a byte differs from what was written.
        """
        with self._naming(key):
            return self._backend.unpack(key, self._members(self._entries[key]))

    def contents(self, key: str) -> Contents:
        """The entry as bytes, as :mod:`cogcache.cache.stored` spells them, checked.

        Raises:
            DamagedCacheError: if a byte differs from what was written.
        """
        with self._naming(key):
            return self._backend.contents(key, self._members(self._entries[key]))

    def facts(self, key: str) -> dict[str, Any]:
        """The facts of an entry, without reading its tensors.

        Raises:
            DamagedCacheError: if a byte differs from what was written.
        """
        with self._naming(key):
            return self._backend.facts(key, *self._members(self._entries[key][1:]))

    @contextmanager
    def _naming(self, key: str) -> Iterator[None]:
        """What is wrong inside is a damage of this entry."""
        try:
            yield
        except ValueError as error:
            raise self._damaged(f"entry {key}: {error}") from None

    def _members(self, members: Members) -> list[Buffer]:
        try:
            return self._storage.members(self._file, self._sha256, members)
        except ValueError as error:
            raise self._damaged(str(error)) from None
        except OSError as error:
            raise self._damaged(f"member {members[0][0]} cannot be read: {error.strerror}") from error

    def verify(self) -> None:
        """Hash the whole file.

        Raises:
            DamagedCacheError: if it is not the one that was committed.
        """
        known, offset = hashlib.sha256(), 0
        try:
            while data := self._storage.pread(self._file, offset, min(_CHUNK, self._bytes - offset)):
                known.update(data)
                offset += len(data)
            grown = self._storage.size(self._file) != self._bytes
        except OSError as error:
            raise self._damaged(f"it cannot be read: {error.strerror}") from error
        if grown or known.hexdigest() != self._sha256:
            raise self._damaged("its bytes are not those that were committed")

    def _damaged(self, what: str) -> DamagedCacheError:
        path = self._storage.root / self._file
        folder = self._storage.root / self._file.partition("/")[0]
        return DamagedCacheError(f"{path} is damaged: {what}.", mend_hint(folder, self.name))
