"""Where zarr's files are, and keeping each array's ``zarr.json`` in step with its shards."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from cogcache.cache.checksum import crc32
from cogcache.cache.files import write_atomic
from cogcache.cache.format import MAX_SLOTS, Identity
from cogcache.cache.index import ShardIndex
from cogcache.cache.lines import load_sealed, parse_object
from cogcache.cache.names import ShardName, parse_shard
from cogcache.cache.regular import open_regular, read_regular
from cogcache.cache.stored import head_facts
from cogcache.cache.zarr.array import RANKS, ZarrArray, array_json, group_json, parse_array, parse_description
from cogcache.errors import CacheError, MismatchError

__all__ = [
    "Known",
    "data_file",
    "known_array",
    "publish",
    "read_head",
    "shard_of",
    "side_file",
    "side_files",
    "slots_of",
]

_METADATA = "zarr.json"
_NO_GROUP = "all"
_LONGEST_HEAD = 1 << 20
_FEWEST_SLOTS = 1024
"""Of a new array, unless its shards are full with less: 16 KB, for more entries that may come."""
_CHUNK_KEY = re.compile(r"([0-9x]+|all)/c\.([0-9]+)((?:\.0)+)")


def _folder(group: str) -> str:
    """Folder of an array within that of its series."""
    return group or _NO_GROUP


def data_file(shard: str) -> str:
    """``49x480x720/c.7.0.0.0.0``: where zarr looks for the shard of rows 7 * slots and on.

    Raises:
        CacheError: if zarr arrays are not known for the series.
    """
    name = parse_shard(shard)
    if name.series not in RANKS:
        raise CacheError(
            f"the series {name.series} cannot be kept in zarr arrays.", "Take --format webdataset."
        )
    return f"{_folder(name.group_text)}/c.{name.number}" + ".0" * RANKS[name.series]


def shard_of(series: str, file: str) -> str | None:
    """The shard whose data file this is, relative to the folder of the series; None if it is none."""
    match = _CHUNK_KEY.fullmatch(file)
    if match is None or series not in RANKS:
        return None
    try:
        name = str(ShardName.of(series, match[1] if match[1] != _NO_GROUP else "", int(match[2])))
    except ValueError:
        return None
    return name if data_file(name) == file else None


def read_head(stream: BinaryIO, size: int) -> dict[str, Any]:
    """What the first line of a data file of ``size`` bytes says: the facts of its series, and ``slots``.

    Raises:
        ValueError: if it is not the head of a shard, or names more slots than the file has room for.
    """
    stream.seek(0)
    line = stream.readline(_LONGEST_HEAD)
    value = parse_object(line)
    slots = value.get("slots")
    if not line.endswith(b"\n") or type(slots) is not int or not 0 < slots <= min(size // 16, MAX_SLOTS):
        raise ValueError("it does not begin like a shard")
    return value


class Known(NamedTuple):
    """What ``zarr.json`` says of an array."""

    array: ZarrArray
    slots: int
    rows: int


def known_array(folder: Path, group: str, facts: dict[str, Any]) -> Known | None:
    """The array of a group; None where there is none, or nothing that can be believed."""
    try:
        return Known(*parse_array(read_regular(folder / _folder(group) / _METADATA), facts))
    except (OSError, ValueError):
        return None


def side_file(shard: str) -> str:
    """``zarr.json`` of the array that a shard belongs to, relative to the folder of its series."""
    return f"{_folder(parse_shard(shard).group_text)}/{_METADATA}"


def slots_of(folder: Path, group: str, wanted: int, planned: int, facts: dict[str, Any]) -> int:
    """Rows of a shard of a group: those of shards that are there, planned or sent away, else as wanted or needed."""
    for path in sorted(folder.glob("*.plan.json")):
        try:
            if parse_shard(path.name.partition(".")[0], folder.name).group_text == group:
                slots = load_sealed(read_regular(path)).get("slots")
                if type(slots) is int and 0 < slots <= MAX_SLOTS:
                    return slots
        except (OSError, ValueError):
            continue
    for path in sorted((folder / _folder(group)).glob("c.*")):
        if shard_of(folder.name, f"{path.parent.name}/{path.name}"):
            try:
                with open_regular(path) as stream:
                    return int(read_head(stream, path.stat().st_size)["slots"])
            except (OSError, ValueError):
                continue
    known = known_array(folder, group, facts)
    return min(known.slots if known else min(wanted, max(planned, _FEWEST_SLOTS)), MAX_SLOTS)


def publish(
    folder: Path, shard: str, entries: int, array: ZarrArray, slots: int, facts: dict[str, Any]
) -> None:
    """Let the array of a shard that is about to be committed reach to its last entry; under the cache lock.

    Raises:
        MismatchError: if another process has begun the array with entries of another kind meanwhile.
    """
    name = parse_shard(shard)
    known = known_array(folder, name.group_text, facts)
    rows = name.number * slots + entries
    if known is not None:
        check_same_array(folder, name, known.array, array)
        rows = max(rows, known.rows)
    _write(folder / _folder(name.group_text) / _METADATA, array_json(array, slots, rows, facts))


def check_same_array(folder: Path, name: ShardName, array: ZarrArray, other: ZarrArray) -> None:
    """Refuse an entry of another kind than those of the array.

    Raises:
        MismatchError: naming every field.
    """
    if array != other:
        was, now = array.facts(), other.facts()
        raise MismatchError(
            f"all entries of the zarr array {folder / _folder(name.group_text)} must be alike:",
            {field: (was[field], now[field]) for field in was if was[field] != now[field]},
            "Give each shape a group of its own, or take --format webdataset.",
        )


def _write(path: Path, data: bytes) -> None:
    if not path.is_file() or path.read_bytes() != data:
        write_atomic(path, data)


def side_files(
    root: Path, identity: Identity, shards: Mapping[str, Mapping[str, ShardIndex]]
) -> dict[str, bytes]:
    """Every ``zarr.json``, as it must be: of the cache, of each series, and of each group that has a sound shard."""
    files = {_METADATA: group_json()}
    for series in sorted(identity.series):
        files[f"{series}/{_METADATA}"] = group_json()
        facts = head_facts(series, identity.model.variant, identity.series[series])
        groups: dict[str, dict[ShardName, ShardIndex]] = {}
        for shard, index in shards.get(series, {}).items():
            name = parse_shard(shard)
            groups.setdefault(name.group_text, {})[name] = index
        for group, found in groups.items():
            said = next(_arrays(root / series, found), None) or _sent(root / series, group, found, facts)
            if said is not None:
                array, slots = said
                rows = max(name.number * slots + len(index.entries) for name, index in found.items())
                files[f"{series}/{_folder(group)}/{_METADATA}"] = array_json(array, slots, rows, facts)
    return files


def _sent(
    folder: Path, group: str, shards: Mapping[ShardName, ShardIndex], facts: dict[str, Any]
) -> tuple[ZarrArray, int] | None:
    """What ``zarr.json`` says of an array whose shards have all been sent to a server."""
    known = known_array(folder, group, facts)
    here = any((folder / data_file(str(name))).exists() for name in shards)
    return None if here or known is None else (known.array, known.slots)


def _arrays(folder: Path, shards: Mapping[ShardName, ShardIndex]) -> Iterator[tuple[ZarrArray, int]]:
    """What shards say of their array, those that can be believed."""
    for name, index in sorted(shards.items()):
        path = folder / data_file(str(name))
        try:
            with open_regular(path) as stream:
                whole = path.stat().st_size
                slots = read_head(stream, whole)["slots"]
                for key, members in index.entries.items():
                    _, offset, size, checksum = members[-1]
                    if offset + size > whole:
                        continue
                    stream.seek(offset)
                    data = stream.read(size)
                    if crc32(data) == checksum:
                        yield parse_description(key, data)[0], slots
        except (OSError, ValueError):
            continue
