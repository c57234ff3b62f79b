"""How entries lie in a tar file, byte for byte. Pure: bytes in, bytes out.

A shard is a ustar archive that any webdataset reader takes::

    __cogcache__/shard.json          what this file is; webdataset skips names in double underscores
    <key>.safetensors  <key>.json    tensors and facts of one entry, then of the next, ...
    two blocks of zeros

Nothing in it depends on time, user, machine or history: equal entries give equal bytes.
"""

from __future__ import annotations

import tarfile
import zlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from cogcache.cache.format import (
    FORMAT,
    VERSION,
    Entry,
    EntryRecord,
    Fingerprint,
    MemberRecord,
    canonical_json,
)
from cogcache.cache.lines import parse_object
from cogcache.errors import CacheError
from cogcache.variants import Variant

if TYPE_CHECKING:
    import torch

__all__ = [
    "BLOCK",
    "END",
    "PREAMBLE",
    "entry_size",
    "is_entry",
    "member",
    "member_names",
    "pack",
    "pack_contents",
    "padded",
    "preamble",
    "unpack",
]

BLOCK = 512
END = bytes(2 * BLOCK)
PREAMBLE = "__cogcache__/shard.json"


def member_names(key: str) -> tuple[str, str]:
    """Names of the two members of an entry, in their order in the file."""
    return f"{key}.safetensors", f"{key}.json"


def preamble(series: str, variant: Variant, fingerprint: Fingerprint) -> bytes:
    """The first member of every shard of a series: enough to understand the file alone."""
    value = {
        "format": FORMAT,
        "version": VERSION,
        "series": series,
        "variant": variant.model_dump(mode="json"),
        "fingerprint": fingerprint,
    }
    return member(PREAMBLE, canonical_json(value).encode())


def pack(entry: Entry, start: int) -> tuple[bytes, EntryRecord]:
    """The bytes of an entry's two members when they begin at byte ``start``, and their record.

    Tensors are stored contiguous, in the dtype they come in.
    """
    import safetensors.torch

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in entry.tensors.items()}
    contents = (safetensors.torch.save(tensors), canonical_json(dict(entry.facts)).encode())
    return pack_contents(entry.key, contents, start)


def pack_contents(key: str, contents: tuple[bytes, bytes], start: int) -> tuple[bytes, EntryRecord]:
    """As :func:`pack`, from the contents of the two members."""
    data, records = b"", []
    for name, content in zip(member_names(key), contents, strict=True):
        offset = start + len(data) + BLOCK
        records.append(MemberRecord(name=name, offset=offset, size=len(content), crc32=zlib.crc32(content)))
        data += member(name, content)
    return data, EntryRecord(key=key, members=tuple(records))


def unpack(key: str, tensors: bytes, facts: bytes) -> Entry:
    """The entry whose members hold these bytes.

    Raises:
        ValueError: if they are not a safetensors file and a JSON object.
    """
    return Entry(key=key, tensors=_load_tensors(tensors), facts=parse_object(facts))


def _load_tensors(data: bytes) -> Mapping[str, torch.Tensor]:
    import safetensors
    import safetensors.torch

    try:
        tensors: dict[str, Any] = safetensors.torch.load(data)
    except (safetensors.SafetensorError, KeyError, TypeError, AssertionError, RuntimeError) as error:
        raise ValueError(f"not a safetensors file: {error}") from None
    return tensors


def entry_size(record: EntryRecord) -> int:
    """Bytes that an entry takes up in the file, headers and padding included."""
    return sum(BLOCK + padded(part.size) for part in record.members)


def is_entry(record: EntryRecord, data: bytes, start: int) -> bool:
    """Whether ``data``, which begins at byte ``start`` of the file, is exactly the recorded entry."""
    if tuple(part.name for part in record.members) != member_names(record.key):
        return False
    at = 0
    for part in record.members:
        body = at + BLOCK
        content = data[body : body + part.size]
        if part.offset != start + body or zlib.crc32(content) != part.crc32:
            return False
        if data[at : body + padded(part.size)] != member(part.name, content):
            return False
        at = body + padded(part.size)
    return at == len(data)


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
