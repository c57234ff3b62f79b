"""The webdataset backend: tar shards that are appended to durably and read by offset."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from cogcache.cache import tar
from cogcache.cache.damage import mend_hint
from cogcache.cache.files import AppendFile, remove, rename, storage_errors, sync_folder, write_atomic
from cogcache.cache.format import Entry, EntryRecord, ShardRecord
from cogcache.cache.index import Members, ShardIndex, build_index, check_key, parse_index
from cogcache.cache.lines import parse_object, seal_line, unseal_line
from cogcache.cache.storage import Storage
from cogcache.errors import DamagedCacheError

__all__ = ["TarShardReader", "TarShardWriter", "durable_keys"]

_MAX_LINE = 1 << 20
_CHUNK = 8 << 20
_MEMBERS = 2


class TarShardWriter:
    """Fills ``<name>.tar.part``; its entries are durable by their lines in ``<name>.index.part``.

    Args:
        folder: Folder of the series.
        name: Shard name without suffix.
        preamble: First bytes of the shard.
        order: Keys that may come, in the order in which they may.

    Raises:
        StorageError: if the files cannot be written.
    """

    def __init__(self, folder: Path, name: str, preamble: bytes, order: Sequence[str]) -> None:
        self._tar, self._part = folder / f"{name}.tar", folder / f"{name}.tar.part"
        self._index, self._lines = folder / f"{name}.index.jsonl", folder / f"{name}.index.part"
        self.name = name
        with storage_errors(self._part):
            if self._tar.exists():  # killed after the rename, before the index
                rename(self._tar, self._part)
            self._records, self._hash, end = _valid_prefix(self._part, self._lines, preamble, order)
        kept = b"".join(_line(record) for record in self._records)
        self._data = AppendFile(self._part, end)
        try:
            self._log = AppendFile(self._lines, len(kept))
            if not end:
                self._data.append(preamble)
                self._hash.update(preamble)
            sync_folder(folder)
        except BaseException:
            self.close()
            raise

    @property
    def keys(self) -> tuple[str, ...]:
        """Keys of the durable entries, in shard order."""
        return tuple(record.key for record in self._records)

    def append(self, entry: Entry) -> None:
        """Add an entry: first its bytes, then the line that makes them count. Durable on return."""
        self._add(*tar.pack(entry, self._data.end))

    def copy(self, key: str, contents: tuple[bytes, bytes]) -> None:
        """:meth:`append` for an entry whose two members have these contents already."""
        self._add(*tar.pack_contents(key, contents, self._data.end))

    def _add(self, data: bytes, record: EntryRecord) -> None:
        self._data.append(data)
        self._log.append(_line(record))
        self._hash.update(data)
        self._records.append(record)

    def seal(self) -> None:
        """Write the end of the archive. A later :meth:`append` is not possible."""
        self._data.append(tar.END)
        self._hash.update(tar.END)

    def commit(self) -> ShardRecord:
        """Give the shard its name, then write its index, which is the commit mark."""
        self.close()
        index = build_index(self._records, self._data.end, self._hash.hexdigest())
        rename(self._part, self._tar)
        write_atomic(self._index, index)
        remove(self._lines)
        return parse_index(index).record(self.name)

    def discard(self) -> None:
        """Remove the files of a shard without entries."""
        self.close()
        remove(self._part, self._lines)

    def close(self) -> None:
        """Close the files; what is durable stays."""
        for file in (self.__dict__.get("_data"), self.__dict__.get("_log")):
            if file is not None:
                file.close()


def _line(record: EntryRecord) -> bytes:
    return seal_line(record.model_dump(mode="json"))


def _read_lines(path: Path) -> list[EntryRecord]:
    """Records of the valid lines at the start of an unfinished shard's index."""
    records: list[EntryRecord] = []
    try:
        stream = path.open("rb")
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


def durable_keys(folder: Path, name: str) -> list[str]:
    """Keys of an unfinished shard's entries that are on disk; cheap, so without reading them."""
    records = _read_lines(folder / f"{name}.index.part")
    sizes = [p.stat().st_size for p in (folder / f"{name}.tar.part", folder / f"{name}.tar") if p.exists()]
    there = max(sizes, default=0)
    return [r.key for r in records if all(m.offset + m.size <= there for m in r.members)]


def _valid_prefix(
    part: Path, lines: Path, preamble: bytes, order: Sequence[str]
) -> tuple[list[EntryRecord], hashlib._Hash, int]:
    """Longest run of recorded entries whose bytes are really there, the hash and size of those bytes."""
    kept: list[EntryRecord] = []
    places = {key: place for place, key in enumerate(order)}
    last = -1
    try:
        stream: BinaryIO = part.open("rb")
    except FileNotFoundError:
        return kept, hashlib.sha256(), 0
    with stream:
        head = stream.read(len(preamble))
        if head != preamble:
            return kept, hashlib.sha256(), 0
        known, end = hashlib.sha256(head), len(head)
        for record in _read_lines(lines):
            data = stream.read(tar.entry_size(record))
            if places.get(record.key, -1) <= last or not tar.is_entry(record, data, end):
                break
            known.update(data)
            kept.append(record)
            last, end = places[record.key], end + len(data)
    return kept, known, end


class TarShardReader:
    """One committed shard, read by offset.

    Args:
        storage: Where the cache is.
        name: The tar file, relative to the cache.
        index: Its parsed index.

    Raises:
        DamagedCacheError: if the file is missing, of another size, or has entries of another form.
    """

    def __init__(self, storage: Storage, name: str, index: ShardIndex) -> None:
        self._storage, self._name, self._entries = storage, name, index.entries
        self._bytes, self._sha256 = index.bytes, index.sha256
        self.name = Path(name).stem
        for key, members in self._entries.items():
            if len(members) != _MEMBERS or (members[0][0], members[1][0]) != tar.member_names(key):
                raise self._damaged(f"entry {key} has other members than tensors and facts")
        if storage.size(name) != self._bytes:
            raise self._damaged("it is missing or its size has changed")

    def __iter__(self) -> Iterator[str]:
        """Keys of all entries, in shard order."""
        return iter(self._entries)

    def read(self, key: str) -> Entry:
        """Read one entry and check the CRC-32 of each member.

        Raises:
            DamagedCacheError: if a byte differs from what was written.
        """
        tensors, facts = self._members(self._entries[key])
        try:
            return tar.unpack(key, tensors, facts)
        except ValueError as error:
            raise self._damaged(f"entry {key}: {error}") from None

    def contents(self, key: str) -> tuple[bytes, bytes]:
        """The entry as it is stored: the bytes of its tensors and of its facts, each checked.

        Raises:
            DamagedCacheError: if a byte differs from what was written.
        """
        tensors, facts = self._members(self._entries[key])
        return tensors, facts

    def facts(self, key: str) -> dict[str, Any]:
        """The facts of an entry, without reading its tensors.

        Raises:
            DamagedCacheError: if a byte differs from what was written.
        """
        try:
            return parse_object(*self._members(self._entries[key][1:]))
        except ValueError as error:
            raise self._damaged(f"entry {key}: {error}") from None

    def _members(self, members: Members) -> list[bytes]:
        try:
            return self._storage.members(self._name, self._sha256, members)
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
            while data := self._storage.pread(self._name, offset, _CHUNK):
                known.update(data)
                offset += len(data)
        except OSError as error:
            raise self._damaged(f"it cannot be read: {error.strerror}") from error
        if known.hexdigest() != self._sha256:
            raise self._damaged("its bytes are not those that were committed")

    def _damaged(self, what: str) -> DamagedCacheError:
        path = self._storage.root / self._name
        return DamagedCacheError(
            f"{path} is damaged: {what}.",
            mend_hint(path.parent, path.stem),
        )
