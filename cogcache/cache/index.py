"""The index of a committed shard: where each entry lies, and a last line that proves it whole."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cogcache.cache.format import EntryRecord, ShardRecord, canonical_json
from cogcache.cache.lines import parse_json, seal_line, unseal_line

__all__ = ["Member", "Members", "ShardIndex", "build_index", "check_key", "parse_index"]

Member = tuple[str, int, int, int]
"""(name, offset, size, crc32): plain, because there may be a million."""

Members = tuple[Member, ...]
"""The members of an entry."""

_KEY = re.compile(r"[0-9a-f]{32}")
_LARGEST = 2**63 - 1
_SHA = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class ShardIndex:
    """What an index file says: its entries by key in shard order, and the size and hash of the shard."""

    entries: dict[str, Members]
    bytes: int
    sha256: str
    index_sha256: str

    def record(self, name: str) -> ShardRecord:
        """The shard's row in the manifest."""
        return ShardRecord(
            name=name,
            entries=len(self.entries),
            bytes=self.bytes,
            sha256=self.sha256,
            index_sha256=self.index_sha256,
        )


def check_key(key: object) -> str:
    """Return ``key`` if it is 32 lower-case hex digits.

    Raises:
        ValueError: if not.
    """
    if not isinstance(key, str) or not _KEY.fullmatch(key):
        raise ValueError(f"{key!r:.80} is not an entry key")
    return key


def build_index(records: Sequence[EntryRecord], size: int, sha256: str) -> bytes:
    """The bytes of an index file for a shard of ``size`` bytes with that hex sha256."""
    body = "".join(canonical_json(r.model_dump(mode="json")) + "\n" for r in records).encode()
    end = {
        "bytes": size,
        "entries": len(records),
        "lines_sha256": hashlib.sha256(body).hexdigest(),
        "sha256": sha256,
    }
    return body + seal_line({"end": end})


def parse_index(data: bytes) -> ShardIndex:
    """Parse and check an index file.

    Raises:
        ValueError: if it is cut, changed, or points outside its shard.
    """
    cut = data.rfind(b"\n", 0, len(data) - 1) + 1
    body, last = data[:cut], data[cut:]
    end = (unseal_line(last) or {}).get("end")
    if not isinstance(end, dict) or end.keys() != {"bytes", "entries", "lines_sha256", "sha256"}:
        raise ValueError("its last line is missing or changed")
    if hashlib.sha256(body).hexdigest() != end["lines_sha256"]:
        raise ValueError("its lines are not those that were written")
    size = _count(end["bytes"])
    if size > _LARGEST:
        raise ValueError("its shard is larger than any file")
    if not isinstance(end["sha256"], str) or not _SHA.fullmatch(end["sha256"]):
        raise ValueError("its last line holds no sha256")
    lines = body.split(b"\n")[:-1]
    entries = dict(_entry(value, size) for value in parse_json(b"[" + b",".join(lines) + b"]"))
    if len(entries) != len(lines) or len(lines) != _count(end["entries"]):
        raise ValueError("its number of entries is wrong")
    return ShardIndex(entries, size, end["sha256"], hashlib.sha256(data).hexdigest())


def _entry(value: Any, limit: int) -> tuple[str, Members]:
    try:
        if len(value) != 2:
            raise ValueError("a line has more than a key and members")
        key = check_key(value["key"])
        return key, tuple([_member(member, key, limit) for member in value["members"]])
    except (KeyError, TypeError, IndexError):
        raise ValueError("a line is not an entry") from None


def _member(value: Any, key: str, limit: int) -> tuple[str, int, int, int]:
    name, offset, size, crc32 = value["name"], value["offset"], value["size"], value["crc32"]
    if len(value) != 4 or not type(offset) is type(size) is type(crc32) is int:
        raise ValueError(f"entry {key} has a wrong member")
    if type(name) is not str or not name.startswith(key):
        raise ValueError(f"entry {key} has a member of another name")
    if min(offset, size, crc32) < 0 or offset + size > limit:
        raise ValueError(f"entry {key} lies outside its shard")
    return name, offset, size, crc32


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError("a number is not a whole number of 0 or more")
    return value
