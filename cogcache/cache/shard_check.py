"""One committed shard, looked at byte by byte: which entries are good, what is wrong with the others.

Where the index is lost, the tar file is walked by its own headers and the index made again.
"""

from __future__ import annotations

import hashlib
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from cogcache.cache import tar
from cogcache.cache.contents import Expectation, content_fault, key_of_facts
from cogcache.cache.damage import Damage
from cogcache.cache.format import EntryRecord, MemberRecord, ShardRecord
from cogcache.cache.index import ShardIndex, build_index, parse_index
from cogcache.cache.lines import parse_object

__all__ = ["ShardFinding", "examine", "read_contents", "read_preamble"]

_CHUNK = 8 << 20
_MEMBER = re.compile(r"([0-9a-f]{32})\.(safetensors|json)")
_LONGEST_PREAMBLE = 1 << 20


@dataclass
class ShardFinding:
    """What a look at a shard gave.

    Attributes:
        good: Entries whose contents are proven, or at least whole, in shard order.
        size: Bytes of the tar file.
        sha256: Its hash.
        damages: What is wrong, without clips.
        index_lost: The index is missing or not to be believed.
        tar_whole: The tar file is the one that was committed, or where nothing names that one, sound.
        proven: A hash from the manifest or the index vouches for the bytes.
    """

    series: str
    name: str
    good: list[EntryRecord] = field(default_factory=list)
    size: int = 0
    sha256: str = ""
    damages: list[Damage] = field(default_factory=list)
    index_lost: bool = False
    tar_whole: bool = False
    proven: bool = False

    def add(self, suffix: str, what: str, key: str = "") -> None:
        """Note a damage of the shard's file with this suffix."""
        self.damages.append(Damage(f"{self.series}/{self.name}.{suffix}", what, self.name, key))

    def index(self) -> bytes:
        """An index file of the good entries."""
        return build_index(self.good, self.size, self.sha256)


def examine(
    folder: Path,
    name: str,
    record: ShardRecord | None,
    expected: Expectation,
    advance: Callable[[int], object] = lambda _: None,
) -> ShardFinding:
    """Look at every byte of a shard.

    Args:
        folder: Folder of the series.
        record: The shard's row in the manifest, where there is one.
        advance: Told how many bytes more were read.
    """
    found = ShardFinding(expected.series, name)
    path = folder / f"{name}.tar"
    index = _read_index(folder / f"{name}.index.jsonl", record, found)
    if not path.is_file() or path.is_symlink():
        found.add("tar", "it is missing")
        return found
    found.size = path.stat().st_size
    named = index.sha256 if index else record.sha256 if record else ""
    size = index.bytes if index else record.bytes if record else found.size
    try:
        with path.open("rb") as stream:
            found.sha256 = _sha256(stream, advance)
            found.proven = found.sha256 == named
            before = len(found.damages)
            if index:
                _check_entries(stream, _records(index), expected, found)
            elif not record or found.proven:
                _walk(stream, expected, found)
    except OSError as error:
        found.good = []
        found.add("tar", f"it cannot be read: {error.strerror}")
        return found
    if found.size != size:
        found.add("tar", f"it has {found.size} bytes, not {size}")
    elif named and not found.proven and len(found.damages) == before:
        found.add("tar", "its bytes are not those that were committed")
    found.tar_whole = len(found.damages) == before
    return found


def _read_index(path: Path, record: ShardRecord | None, found: ShardFinding) -> ShardIndex | None:
    try:
        index = parse_index(path.read_bytes())
        if record is not None and index.record(found.name) != record:
            raise ValueError("it is not the one that the manifest names")
        for key, members in index.entries.items():
            if tuple(member[0] for member in members) != tar.member_names(key):
                raise ValueError(f"entry {key} has other members than tensors and facts")
        return index
    except FileNotFoundError:
        found.add("index.jsonl", "it is missing")
    except (OSError, ValueError) as error:
        found.add("index.jsonl", str(error))
    found.index_lost = True
    return None


def _records(index: ShardIndex) -> list[EntryRecord]:
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


def _check_entries(
    stream: BinaryIO, records: list[EntryRecord], expected: Expectation, found: ShardFinding
) -> None:
    """Everything that the index names, where it names it, and all bytes between."""
    head = tar.preamble(expected.series, expected.variant, expected.fingerprint)
    stream.seek(0)
    if stream.read(len(head)) != head:
        found.add("tar", f"{tar.PREAMBLE} is not what every shard of this series begins with")
    at = len(head)
    for record in records:
        contents = read_contents(stream, record, found.size)
        if contents is None:
            found.add("tar", "a member is cut or does not match its checksum", record.key)
        else:
            data, placed = tar.pack_contents(record.key, contents, at)
            fault = content_fault(expected, record.key, contents) or _key_fault(
                expected, record.key, contents
            )
            stream.seek(at)
            if fault:
                found.add("tar", fault, record.key)
            else:
                found.good.append(record)
            if placed != record or stream.read(len(data)) != data:
                found.add("tar", "a header or padding in the archive has changed", record.key)
        at += tar.entry_size(record)
    stream.seek(at)
    if stream.read(len(tar.END) + 1) != tar.END:
        found.add("tar", "the end of the archive has changed")


def _key_fault(expected: Expectation, key: str, contents: tuple[bytes, bytes]) -> str:
    wanted = key_of_facts(expected.series, expected.fingerprint, parse_object(contents[1]))
    return f"its facts belong to another key, {wanted}" if wanted not in (None, key) else ""


def read_contents(stream: BinaryIO, record: EntryRecord, limit: int) -> tuple[bytes, bytes] | None:
    """The contents of an entry's members, None if they are not those recorded; ``limit`` is the file's size."""
    contents = []
    for part in record.members:
        if part.offset + part.size > limit:
            return None
        stream.seek(part.offset)
        data = stream.read(part.size)
        if len(data) != part.size or zlib.crc32(data) != part.crc32:
            return None
        contents.append(data)
    return contents[0], contents[1]


def _walk(stream: BinaryIO, expected: Expectation, found: ShardFinding) -> None:
    """Entries as the archive's own headers tell them; each must be exactly what a writer makes of it."""
    head = tar.preamble(expected.series, expected.variant, expected.fingerprint)
    stream.seek(0)
    if stream.read(len(head)) != head:
        found.add("tar", f"{tar.PREAMBLE} is not what every shard of this series begins with")
        return
    at = len(head)
    try:
        for key, contents in _pairs(stream, found.size):
            data, record = tar.pack_contents(key, contents, at)
            fault = content_fault(expected, key, contents) or _key_fault(expected, key, contents)
            here = stream.tell()
            stream.seek(at)
            if stream.read(len(data)) != data:
                fault = "a header or padding in the archive has changed"
            stream.seek(here)
            at += len(data)
            if fault:
                found.add("tar", fault, key)
            else:
                found.good.append(record)
    except ValueError as error:
        found.add("tar", str(error))
    if len({record.key for record in found.good}) != len(found.good):
        found.good = []
        found.add("tar", "an entry is in it twice")


def _pairs(stream: BinaryIO, size: int) -> Iterator[tuple[str, tuple[bytes, bytes]]]:
    while (first := _next_member(stream, size)) is not None:
        second = _next_member(stream, size)
        names = [_MEMBER.fullmatch(part[0]) for part in (first, second) if part]
        if second is None or [m and m[2] for m in names] != ["safetensors", "json"]:
            raise ValueError(f"the members at byte {stream.tell()} are not an entry")
        if first[0].split(".")[0] != second[0].split(".")[0]:
            raise ValueError(f"the members before byte {stream.tell()} belong to two entries")
        yield first[0].split(".")[0], (first[1], second[1])


def _next_member(stream: BinaryIO, size: int) -> tuple[str, bytes] | None:
    """Name and content of the member that begins here; None at the end of the archive."""
    at = stream.tell()
    block = stream.read(tar.BLOCK)
    if block == bytes(tar.BLOCK):
        if block + stream.read(tar.BLOCK + 1) != tar.END:
            raise ValueError("the end of the archive has changed")
        return None
    try:
        info = tarfile.TarInfo.frombuf(block, "ascii", "strict")
    except (tarfile.HeaderError, ValueError) as error:
        raise ValueError(f"there is no whole tar header at byte {at} ({error})") from None
    if not info.isreg() or at + tar.BLOCK + tar.padded(info.size) > size:
        raise ValueError(f"the tar header at byte {at} names no file, or one that is cut")
    content = stream.read(info.size)
    stream.seek(at + tar.BLOCK + tar.padded(info.size))
    return info.name, content


def read_preamble(path: Path) -> dict[str, object]:
    """What the first member of a shard says.

    Raises:
        ValueError: if it does not begin like a shard.
        OSError: if it cannot be read.
    """
    size = path.stat().st_size
    with path.open("rb") as stream:
        first = _next_member(stream, min(size, _LONGEST_PREAMBLE))
    if first is None or first[0] != tar.PREAMBLE:
        raise ValueError(f"it does not begin with {tar.PREAMBLE}")
    return parse_object(first[1])
