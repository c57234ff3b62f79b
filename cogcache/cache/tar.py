"""How entries lie in a tar file, byte for byte. Pure: bytes in, bytes out.

A shard is a ustar archive that any webdataset reader takes::

    __cogcache__/shard.json          what this file is; webdataset skips names in double underscores
    <key>.safetensors  <key>.json    tensors and facts of one entry, then of the next, ...
    two blocks of zeros

Nothing in it depends on time, user, machine or history: equal entries give equal bytes.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from cogcache.cache.checksum import crc32
from cogcache.cache.format import Entry, EntryRecord, Identity, MemberRecord, canonical_json
from cogcache.cache.index import ShardIndex
from cogcache.cache.lines import parse_object
from cogcache.cache.names import parse_shard
from cogcache.cache.stored import Contents, contents_of, entry_of
from cogcache.cache.tensors import Buffer
from cogcache.errors import CacheError

__all__ = ["TarBackend", "TarLayout"]

BLOCK = 512
END = bytes(2 * BLOCK)
PREAMBLE = "__cogcache__/shard.json"
_LONGEST_PREAMBLE = 1 << 20
_KEY = re.compile(r"[0-9a-f]{32}")


class TarLayout:
    """As :class:`cogcache.cache.backend.Layout` says; any entry may stand beside any other.

    Args:
        file: Name of the tar file.
        facts: What the shard says of itself.
    """

    def __init__(self, file: str, facts: dict[str, Any]) -> None:
        self.file = file
        self.head = member(PREAMBLE, canonical_json(facts).encode())

    def pack(self, entry: Entry, start: int) -> tuple[bytes, EntryRecord]:
        """The bytes of an entry's two members when they begin at byte ``start``, and their record."""
        return self.pack_contents(entry.key, contents_of(entry), start)

    def pack_contents(self, key: str, contents: Contents, start: int) -> tuple[bytes, EntryRecord]:
        """As :meth:`pack`, from the contents of the two members."""
        data, records = b"", []
        for name, content in zip(member_names(key), contents, strict=True):
            offset = start + len(data) + BLOCK
            records.append(MemberRecord(name=name, offset=offset, size=len(content), crc32=crc32(content)))
            data += member(name, content)
        return data, EntryRecord(key=key, members=tuple(records))

    def entry_size(self, record: EntryRecord) -> int:
        """Bytes that an entry takes up in the file, headers and padding included."""
        return sum(BLOCK + padded(part.size) for part in record.members)

    def is_entry(self, record: EntryRecord, data: bytes, start: int) -> bool:
        """Whether ``data``, which begins at byte ``start`` of the file, is exactly the recorded entry."""
        if tuple(part.name for part in record.members) != member_names(record.key):
            return False
        at = 0
        for part in record.members:
            body = at + BLOCK
            content = data[body : body + part.size]
            if part.offset != start + body or crc32(content) != part.crc32:
                return False
            if data[at : body + padded(part.size)] != member(part.name, content):
                return False
            at = body + padded(part.size)
        return at == len(data)

    def end(self, records: Sequence[EntryRecord]) -> bytes:
        """Two blocks of zeros."""
        _ = records
        return END

    def publish(self, entries: int) -> None:
        """Nothing: a tar file speaks for itself."""


class TarBackend:
    """Shards as tar files in the folder of their series."""

    fixed_slots = False

    def data_file(self, shard: str) -> str:
        """``latents-00007.tar``."""
        return f"{shard}.tar"

    def shard_of(self, series: str, file: str) -> str | None:
        """As :meth:`cogcache.cache.backend.Backend.shard_of`."""
        try:
            return str(parse_shard(file.removesuffix(".tar"), series)) if file.endswith(".tar") else None
        except ValueError:
            return None

    def layout(self, folder: Path, shard: str, facts: dict[str, Any], slots: int) -> TarLayout:
        """The bytes of a shard, which may hold any number of entries."""
        _ = folder, slots
        return TarLayout(self.data_file(shard), facts)

    def member_names(self, key: str) -> tuple[str, str]:
        """As the members are called in the archive."""
        return member_names(key)

    def unpack(self, key: str, members: Sequence[Buffer]) -> Entry:
        """As :meth:`cogcache.cache.backend.Backend.unpack`."""
        return entry_of(key, *members)

    def contents(self, key: str, members: Sequence[Buffer]) -> Contents:
        """The members hold just these bytes."""
        _ = key
        return bytes(members[0]), bytes(members[1])

    def facts(self, key: str, member: Buffer) -> dict[str, Any]:
        """As :meth:`cogcache.cache.backend.Backend.facts`."""
        _ = key
        return parse_object(bytes(member))

    def slots(self, folder: Path, group: str, wanted: int, planned: int, facts: dict[str, Any]) -> int:
        """As wanted: shards may be of any size."""
        _ = folder, group, planned, facts
        return wanted

    def side_file(self, shard: str) -> None:
        """None."""

    def side_files(
        self, root: Path, identity: Identity, shards: Mapping[str, Mapping[str, ShardIndex]]
    ) -> dict[str, bytes]:
        """None."""
        _ = root, identity, shards
        return {}

    def read_head(self, stream: BinaryIO, size: int) -> dict[str, Any]:
        """What the first member says."""
        first = _next_member(stream, 0, min(size, _LONGEST_PREAMBLE))
        if first is None or first.name != PREAMBLE:
            raise ValueError(f"it does not begin with {PREAMBLE}")
        stream.seek(first.offset)
        return parse_object(stream.read(first.size))

    def walk(self, stream: BinaryIO, size: int, start: int) -> Iterator[EntryRecord]:
        """Entries by the archive's own headers."""
        while (first := _next_member(stream, start, size)) is not None:
            key = first.name.split(".")[0]
            second = _next_member(stream, first.offset + padded(first.size), size)
            if second is None or (first.name, second.name) != member_names(key) or not _KEY.fullmatch(key):
                raise ValueError(f"the members at byte {start} are not an entry")
            yield EntryRecord(key=key, members=(first, second))
            start = second.offset + padded(second.size)


def _next_member(stream: BinaryIO, at: int, size: int) -> MemberRecord | None:
    """The member that begins at byte ``at`` of a file of ``size`` bytes; None at the end of the archive."""
    stream.seek(at)
    block = stream.read(BLOCK)
    if block == bytes(BLOCK):
        if block + stream.read(BLOCK + 1) != END:
            raise ValueError("the end of the archive has changed")
        return None
    try:
        info = tarfile.TarInfo.frombuf(block, "ascii", "strict")
    except (tarfile.HeaderError, ValueError) as error:
        raise ValueError(f"there is no whole tar header at byte {at} ({error})") from None
    # A size in base 256 may be negative.
    if not info.isreg() or info.size < 0 or at + BLOCK + padded(info.size) > size:
        raise ValueError(f"the tar header at byte {at} names no file, or one that is cut")
    content = stream.read(info.size)
    return MemberRecord(name=info.name, offset=at + BLOCK, size=info.size, crc32=crc32(content))


def member_names(key: str) -> tuple[str, str]:
    """Names of the two members of an entry, in their order in the file."""
    return f"{key}.safetensors", f"{key}.json"


def member(name: str, content: bytes) -> bytes:
    """A whole member: header, content, and zeros up to a full block.

    Raises:
        CacheError: if it is too large for a ustar archive.
    """
    info = tarfile.TarInfo(name)
    info.size = len(content)
    info.mode = 0o644
    try:
        header = info.tobuf(tarfile.USTAR_FORMAT, "ascii", "strict")
    except ValueError as error:
        raise CacheError(f"{name} cannot be stored in a tar file: {error}", "Take fewer frames.") from None
    return header + content + bytes(padded(len(content)) - len(content))


def padded(size: int) -> int:
    """``size`` bytes of content with the zeros behind them."""
    return -(-size // BLOCK) * BLOCK
