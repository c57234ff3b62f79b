"""One committed shard, looked at byte by byte: which entries are good, what is wrong with the others.

Where the index is lost, the data file is walked by what it says itself and the index made again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

from cogcache.cache.backend import Backend
from cogcache.cache.checksum import crc32
from cogcache.cache.contents import Expectation, content_fault, key_of_facts
from cogcache.cache.damage import Damage
from cogcache.cache.format import EntryRecord, MemberRecord, ShardRecord
from cogcache.cache.index import ShardIndex, build_index, parse_index
from cogcache.cache.lines import parse_object
from cogcache.cache.names import parse_shard
from cogcache.cache.regular import open_regular, read_regular
from cogcache.cache.stored import Contents, head_facts

__all__ = ["ShardFinding", "examine", "read_contents", "records_of"]

_CHUNK = 8 << 20


@dataclass
class ShardFinding:
    """What a look at a shard gave.

    Attributes:
        file: Name of the data file, relative to the folder of the series.
        good: Entries whose contents are proven, or at least whole, in shard order.
        size: Bytes of the data file.
        sha256: Its hash.
        damages: What is wrong, without clips.
        data_whole: The data file is the one that was committed, or where nothing names that one, sound.
        index: The index, if it can be believed.
        proven: A hash from the manifest or the index vouches for the bytes.
    """

    series: str
    name: str
    file: str
    good: list[EntryRecord] = field(default_factory=list)
    size: int = 0
    sha256: str = ""
    damages: list[Damage] = field(default_factory=list)
    index: ShardIndex | None = None
    data_whole: bool = False
    proven: bool = False

    def damage(self, what: str, key: str = "", file: str = "") -> None:
        """Note a damage, of the data file if ``file`` names no other one of the series."""
        self.damages.append(Damage(f"{self.series}/{file or self.file}", what, self.name, key))

    @property
    def index_lost(self) -> bool:
        """Whether the index is missing or not to be believed."""
        return self.index is None

    def index_file(self) -> bytes:
        """An index file of the good entries."""
        return build_index(self.good, self.size, self.sha256)


def examine(
    folder: Path,
    name: str,
    record: ShardRecord | None,
    expected: Expectation,
    backend: Backend,
    advance: Callable[[int], object] = lambda _: None,
) -> ShardFinding:
    """Look at every byte of a shard.

    Args:
        folder: Folder of the series.
        record: The shard's row in the manifest, where there is one.
        backend: How its entries are stored.
        advance: Told how many bytes more were read.
    """
    found = ShardFinding(expected.series, name, backend.data_file(name))
    expected = replace(expected, group=parse_shard(name).group_text)
    path = folder / found.file
    index = found.index = _read_index(folder, record, backend, found)
    if not path.is_file() or path.is_symlink():
        found.damage("it is missing")
        return found
    found.size = path.stat().st_size
    named = index.sha256 if index else record.sha256 if record else ""
    size = index.bytes if index else record.bytes if record else found.size
    before = len(found.damages)
    try:
        with open_regular(path) as stream:
            found.sha256 = _sha256(stream, advance)
            found.proven = found.sha256 == named
            if index or not record or found.proven:
                _Look(stream, folder, expected, backend, found).at(index)
    except OSError as error:
        found.good = []
        found.damage(f"it cannot be read: {error.strerror}")
        return found
    if found.size != size:
        found.damage(f"it has {found.size} bytes, not {size}")
    elif named and not found.proven and len(found.damages) == before:
        found.damage("its bytes are not those that were committed")
    found.data_whole = len(found.damages) == before
    return found


def _read_index(
    folder: Path, record: ShardRecord | None, backend: Backend, found: ShardFinding
) -> ShardIndex | None:
    file = f"{found.name}.index.jsonl"
    try:
        index = parse_index(read_regular(folder / file))
        if record is not None and index.record(found.name) != record:
            raise ValueError("it is not the one that the manifest names")
        for key, members in index.entries.items():
            if tuple(member[0] for member in members) != backend.member_names(key):
                raise ValueError(f"entry {key} has other members than tensors and facts")
        return index
    except FileNotFoundError:
        found.damage("it is missing", file=file)
    except (OSError, ValueError) as error:
        found.damage(str(error), file=file)
    return None


def records_of(index: ShardIndex) -> list[EntryRecord]:
    """The entries of an index, in shard order."""
    fields = ("name", "offset", "size", "crc32")
    return [
        EntryRecord(
            key=key, members=tuple(MemberRecord(**dict(zip(fields, m, strict=True))) for m in members)
        )
        for key, members in index.entries.items()
    ]


def _sha256(stream: BinaryIO, advance: Callable[[int], object]) -> str:
    known = hashlib.sha256()
    while data := stream.read(_CHUNK):
        known.update(data)
        advance(len(data))
    return known.hexdigest()


class _Look:
    """A look at one data file, entry by entry."""

    def __init__(
        self, stream: BinaryIO, folder: Path, expected: Expectation, backend: Backend, found: ShardFinding
    ) -> None:
        self._stream, self._expected, self._backend, self._found = stream, expected, backend, found
        facts = head_facts(expected.series, expected.variant, expected.fingerprint)
        try:
            slots = backend.read_head(stream, found.size).get("slots")
        except ValueError:
            slots = None
        self._layout = backend.layout(folder, found.name, facts, slots if type(slots) is int else 0)

    def at(self, index: ShardIndex | None) -> None:
        """Everything that the index names, where it names it, and all bytes between.

        Without an index, every entry as the file itself tells it; each must be exactly what a writer makes of it.
        """
        head = self._layout.head
        if self._bytes(0, len(head)) != head:
            self._found.damage("its head is not what every shard of this series begins with")
            if index is None:
                return
        if index is not None:
            self._entries(records_of(index), lost=False)
            return
        try:
            self._entries(self._backend.walk(self._stream, self._found.size, len(head)), lost=True)
        except ValueError as error:
            self._found.damage(str(error))
        if len({record.key for record in self._found.good}) != len(self._found.good):
            self._found.good = []
            self._found.damage("an entry is in it twice")

    def _entries(self, records: Iterable[EntryRecord], *, lost: bool) -> None:
        """One entry directly after another, then the end. ``lost``: nothing else vouches for them."""
        at, seen = len(self._layout.head), []
        for record in records:
            size = self._layout.entry_size(record)
            fault = self._fault(record)
            placed = self._layout.is_entry(record, self._bytes(at, size), at)
            if not fault and not (lost and not placed):
                self._found.good.append(record)
            if fault:
                self._found.damage(fault, record.key)
            elif not placed:
                self._found.damage("a header or padding around it has changed", record.key)
            at += size
            seen.append(record)
        end = self._layout.end(seen)
        if self._bytes(at, len(end) + 1) != end:
            self._found.damage("its end, behind the last entry, has changed")

    def _fault(self, record: EntryRecord) -> str:
        members = _read_members(self._stream, record, self._found.size)
        if members is None:
            return "a member is cut or does not match its checksum"
        try:
            contents = self._backend.contents(record.key, members)
        except ValueError as error:
            return str(error)
        return content_fault(self._expected, record.key, contents) or self._key_fault(record.key, contents)

    def _key_fault(self, key: str, contents: Contents) -> str:
        wanted = key_of_facts(self._expected.series, self._expected.fingerprint, parse_object(contents[1]))
        return f"its facts belong to another key, {wanted}" if wanted not in (None, key) else ""

    def _bytes(self, start: int, size: int) -> bytes:
        """What the file has of these bytes; the numbers may be forged."""
        limit = self._found.size
        self._stream.seek(min(start, limit))
        return self._stream.read(min(size, limit))


def _read_members(stream: BinaryIO, record: EntryRecord, limit: int) -> list[bytes] | None:
    """The members of an entry, None if they are not those recorded; ``limit`` is the file's size."""
    members = []
    for part in record.members:
        if part.offset + part.size > limit:
            return None
        stream.seek(part.offset)
        data = stream.read(part.size)
        if len(data) != part.size or crc32(data) != part.crc32:
            return None
        members.append(data)
    return members


def read_contents(stream: BinaryIO, record: EntryRecord, limit: int, backend: Backend) -> Contents | None:
    """An entry as bytes, None if they are not those recorded; ``limit`` is the size of the data file."""
    if tuple(part.name for part in record.members) != backend.member_names(record.key):
        return None
    members = _read_members(stream, record, limit)
    try:
        return None if members is None else backend.contents(record.key, members)
    except ValueError:
        return None
