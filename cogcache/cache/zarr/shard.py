"""The zarr backend: a shard is a shard of a zarr v3 array, a chunk one entry.

::

    {"fingerprint":...,"slots":64,...}\\n   what this file is, as JSON; no chunk refers to it
    <chunk> <description>                  tensor and facts of one entry, then of the next, ...
    offset and size of each chunk, crc32c   the index of zarr's sharding codec

The sharding codec allows bytes that no chunk refers to. Zarr's own writer makes a whole shard anew for each chunk, so
chunks are encoded here and appended.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from cogcache.cache.checksum import crc32
from cogcache.cache.format import (
    Entry,
    EntryRecord,
    Identity,
    MemberRecord,
    ZarrCompression,
    canonical_json,
)
from cogcache.cache.index import ShardIndex, check_key
from cogcache.cache.lines import parse_object
from cogcache.cache.names import parse_shard
from cogcache.cache.stored import Contents, contents_of, entry_of
from cogcache.cache.tensors import Buffer
from cogcache.cache.zarr.array import RANKS, ZarrArray, description, parse_description
from cogcache.cache.zarr.chunk import CRC_SIZE, crc32c, decode, encode, sound
from cogcache.cache.zarr.files import (
    check_same_array,
    data_file,
    known_array,
    publish,
    read_head,
    shard_of,
    side_file,
    side_files,
    slots_of,
)
from cogcache.errors import CacheError, MismatchError

if TYPE_CHECKING:
    import torch

__all__ = ["ZarrBackend", "ZarrLayout"]

_EMPTY = 2**64 - 1
_SLOT = struct.Struct("<QQ")


class ZarrLayout:
    """As :class:`cogcache.cache.backend.Layout` says; all entries are alike.

    Args:
        folder: Folder of the series.
        shard: Shard name without suffix.
        facts: What the shard says of itself.
        slots: Rows of a shard of the array.
        compression: Where neither the array nor an entry of the shard decides it yet.
    """

    def __init__(
        self, folder: Path, shard: str, facts: dict[str, Any], slots: int, compression: ZarrCompression
    ) -> None:
        self.file = data_file(shard)
        self.head = f"{canonical_json({**facts, 'slots': slots})}\n".encode()
        self._folder, self._name, self._facts = folder, parse_shard(shard), facts
        self._slots, self._compression = slots, compression
        known = known_array(folder, self._name.group_text, facts)
        self._array = known.array if known else None

    def pack(self, entry: Entry, start: int) -> tuple[bytes, EntryRecord]:
        """The bytes of an entry that begins at byte ``start``, and its record.

        Raises:
            CacheError: if it has not just one tensor, or one that no array can hold.
            MismatchError: if it is not like the other entries of the array.
        """
        tensor, array = self._tensor(entry)
        self._admit(array)
        parts = (encode(tensor, array.compression), description(entry.key, array, entry.facts))
        records, at = [], start
        for name, part in zip(member_names(entry.key), parts, strict=True):
            records.append(MemberRecord(name=name, offset=at, size=len(part), crc32=crc32(part)))
            at += len(part)
        return b"".join(parts), EntryRecord(key=entry.key, members=tuple(records))

    def _tensor(self, entry: Entry) -> tuple[torch.Tensor, ZarrArray]:
        shapes = {name: list(tensor.shape) for name, tensor in entry.tensors.items()}
        rank = RANKS[self._name.series]
        if len(shapes) != 1 or any(len(shape) != rank for shape in shapes.values()):
            raise CacheError(
                f"entry {entry.key} holds {shapes}, not one tensor of {rank} axes as {self._name.series} must in zarr.",
                "Take --format webdataset.",
            )
        ((name, tensor),) = entry.tensors.items()
        compression = self._array.compression if self._array else self._compression
        dtype = str(tensor.dtype).removeprefix("torch.")
        try:
            array = ZarrArray.checked(name, dtype, list(tensor.shape), compression)
        except ValueError as error:
            raise CacheError(
                f"entry {entry.key} cannot be kept in a zarr array: {error}.", "Take --format webdataset."
            ) from None
        return tensor.detach().cpu().contiguous(), array

    def _admit(self, array: ZarrArray) -> None:
        if self._array is None:
            self._array = array
        check_same_array(self._folder, self._name, self._array, array)

    def pack_contents(self, key: str, contents: Contents, start: int) -> tuple[bytes, EntryRecord]:
        """As :meth:`pack`, from an entry's bytes as :mod:`cogcache.cache.stored` spells them."""
        try:
            entry = entry_of(key, *contents)
            same = contents_of(entry) == contents
        except ValueError as error:
            raise CacheError(f"entry {key} cannot be taken over: {error}.") from None
        if not same:
            raise CacheError(f"entry {key} cannot be taken over: its bytes are not spelt as here.")
        return self.pack(entry, start)

    def entry_size(self, record: EntryRecord) -> int:
        """Bytes that an entry takes up in the file."""
        return sum(part.size for part in record.members)

    def is_entry(self, record: EntryRecord, data: bytes, start: int) -> bool:
        """Whether ``data``, which begins at byte ``start`` of the file, is exactly the recorded entry."""
        if tuple(part.name for part in record.members) != member_names(record.key):
            return False
        chunk, said = record.members
        cut = chunk.size
        parts = data[:cut], data[cut:]
        if (chunk.offset, said.offset) != (start, start + cut) or len(data) != cut + said.size:
            return False
        if (crc32(parts[0]), crc32(parts[1])) != (chunk.crc32, said.crc32):
            return False
        try:
            array, facts = parse_description(record.key, parts[1])
            self._admit(array)
        except (ValueError, MismatchError):
            return False
        return parts[1] == description(record.key, array, facts)

    def end(self, records: Sequence[EntryRecord]) -> bytes:
        """The index of the sharding codec: where the chunk of each slot is."""
        places = [_SLOT.pack(record.members[0].offset, record.members[0].size) for record in records]
        index = b"".join(places) + _SLOT.pack(_EMPTY, _EMPTY) * (self._slots - len(places))
        return index + crc32c(index)

    def publish(self, entries: int) -> None:
        """Bring the array's ``zarr.json`` up to date."""
        if self._array is not None:
            publish(self._folder, str(self._name), entries, self._array, self._slots, self._facts)


class ZarrBackend:
    """Shards as those of zarr arrays, one array a group.

    Args:
        compression: Of new arrays.
    """

    fixed_slots = True

    def __init__(self, compression: ZarrCompression = "zstd") -> None:
        self._compression: ZarrCompression = compression

    def data_file(self, shard: str) -> str:
        """``49x480x720/c.7.0.0.0.0``."""
        return data_file(shard)

    def shard_of(self, series: str, file: str) -> str | None:
        """As :meth:`cogcache.cache.backend.Backend.shard_of`."""
        return shard_of(series, file)

    def layout(self, folder: Path, shard: str, facts: dict[str, Any], slots: int) -> ZarrLayout:
        """The bytes of a shard."""
        return ZarrLayout(folder, shard, facts, slots, self._compression)

    def member_names(self, key: str) -> tuple[str, str]:
        """``<key>.chunk`` and ``<key>.json``."""
        return member_names(key)

    def unpack(self, key: str, members: Sequence[Buffer]) -> Entry:
        """As :meth:`cogcache.cache.backend.Backend.unpack`."""
        array, facts = parse_description(key, bytes(members[1]))
        tensor = decode(members[0], array.compression, array.shape, array.dtype)
        return Entry(key=key, tensors={array.tensor: tensor}, facts=facts)

    def contents(self, key: str, members: Sequence[Buffer]) -> Contents:
        """As :meth:`unpack`, as bytes; the chunk's crc32c is checked, too."""
        if not sound(bytes(members[0])):
            raise ValueError("its chunk does not match its crc32c")
        return contents_of(self.unpack(key, members))

    def facts(self, key: str, member: Buffer) -> dict[str, Any]:
        """As :meth:`cogcache.cache.backend.Backend.facts`."""
        return parse_description(key, bytes(member))[1]

    def slots(self, folder: Path, group: str, wanted: int, planned: int, facts: dict[str, Any]) -> int:
        """Rows of a shard: all shards of an array have the same number."""
        return slots_of(folder, group, wanted, planned, facts)

    def side_file(self, shard: str) -> str:
        """``49x480x720/zarr.json``."""
        return side_file(shard)

    def side_files(
        self, root: Path, identity: Identity, shards: Mapping[str, Mapping[str, ShardIndex]]
    ) -> dict[str, bytes]:
        """Every ``zarr.json``."""
        return side_files(root, identity, shards)

    def read_head(self, stream: BinaryIO, size: int) -> dict[str, Any]:
        """What the first line says."""
        return read_head(stream, size)

    def walk(self, stream: BinaryIO, size: int, start: int) -> Iterator[EntryRecord]:
        """Entries by the index of the sharding codec; what is between two chunks describes the first of them."""
        slots = read_head(stream, size)["slots"]
        end = size - slots * _SLOT.size - CRC_SIZE
        stream.seek(max(end, 0))
        index = stream.read()
        if end < start or crc32c(index[:-CRC_SIZE]) != index[-CRC_SIZE:]:
            raise ValueError("the index of its chunks is cut or does not match its crc32c")
        places = [place for place in _SLOT.iter_unpack(index[:-CRC_SIZE]) if place != (_EMPTY, _EMPTY)]
        for (offset, length), (following, _) in zip(places, [*places[1:], (end, 0)], strict=True):
            if not start <= offset <= offset + length <= following <= end:
                raise ValueError("its chunks are not one behind another")
            stream.seek(offset)
            chunk, said = stream.read(length), stream.read(following - offset - length)
            yield _record(offset, chunk, said)
            start = following


def _record(offset: int, chunk: bytes, said: bytes) -> EntryRecord:
    key = check_key(parse_object(said).get("key"))
    sizes = ((offset, chunk), (offset + len(chunk), said))
    members = [
        MemberRecord(name=name, offset=at, size=len(data), crc32=crc32(data))
        for name, (at, data) in zip(member_names(key), sizes, strict=True)
    ]
    return EntryRecord(key=key, members=tuple(members))


def member_names(key: str) -> tuple[str, str]:
    """Names of the two members of an entry, in their order in the file."""
    return f"{key}.chunk", f"{key}.json"
