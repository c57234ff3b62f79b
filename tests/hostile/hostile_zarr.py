"""Hostile zarr caches: heads, chunks, descriptions, chunk indexes and ``zarr.json``, all checksums above them right."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from random import Random
from typing import Any

import torch
from hostile_cache import (
    CacheBox,
    Files,
    fill_planned,
    index_case,
    line,
    mend,
    read_all,
    sealed,
    sealed_line,
    use,
)
from hostile_kit import Case, Target
from hostile_mutations import NUMBERS, STRINGS, mutate_bytes, mutate_json, spoil_json

from cogcache.cache.check import check_cache
from cogcache.cache.checksum import crc32
from cogcache.cache.format import EntryRecord, MemberRecord, canonical_json
from cogcache.cache.index import build_index, parse_index
from cogcache.cache.zarr.chunk import CRC_SIZE, DTYPES, crc32c, decode, encode
from cogcache.errors import CacheError

__all__ = ["ZarrBox", "zarr_targets"]

_SLOT = struct.Struct("<QQ")
_HEADER = struct.Struct("<BBBBIII")
_EMPTY = (2**64 - 1, 2**64 - 1)
_SIZES = (0, 1, 15, 16, 17, 255, 1 << 16, (1 << 31) - 17, (1 << 31) - 1, 1 << 31, (1 << 32) - 1)
_FAR = (0, 1, 1 << 31, 1 << 40, (1 << 63) - 1, 1 << 63, (1 << 64) - 2, (1 << 64) - 1)
Places = list[tuple[int, int]]
Contents = list[tuple[str, list[bytes]]]


class ZarrBox(CacheBox):
    """The same cache in zarr arrays."""

    kind = "zarr"

    def entries(self, name: str) -> tuple[bytes, Contents]:
        """The head of the shard with this index, newline included, and chunk and description of its entries."""
        data = self.files[self.data_file(name)]
        index = parse_index(self.files[name])
        contents = [(key, [data[o : o + s] for _, o, s, _ in ms]) for key, ms in index.entries.items()]
        return data[: data.index(b"\n") + 1], contents

    def shard(self, head: bytes, entries: Contents, slots: int) -> tuple[bytes, list[EntryRecord], Places]:
        """A data file without its chunk index, the records of its entries, and the places of all slots."""
        data, records = head, []
        for key, parts in entries:
            members = []
            for member, part in zip(self.backend.member_names(key), parts, strict=True):
                members.append(MemberRecord(name=member, offset=len(data), size=len(part), crc32=crc32(part)))
                data += part
            records.append(EntryRecord(key=key, members=tuple(members)))
        places = [(record.members[0].offset, record.members[0].size) for record in records]
        return data, records, places + [_EMPTY] * (slots - len(places))

    def with_entries(self, name: str, entries: Contents) -> Files:
        """All files, where the shard holds these entries and everything above agrees."""
        head = self.entries(name)[0]
        data, records, places = self.shard(head, entries, json.loads(head)["slots"])
        return self.with_data(name, data + chunk_index(places), records)

    def with_data(self, name: str, data: bytes, records: list[EntryRecord]) -> Files:
        """All files, with another data file that index and manifest name."""
        digest = hashlib.sha256(data).hexdigest()
        index = build_index(records, len(data), digest)
        return self.with_index(name, index, data, bytes=len(data), sha256=digest, entries=len(records))


def chunk_index(places: Places) -> bytes:
    """The index at the end of a shard."""
    data = b"".join(_SLOT.pack(*place) for place in places)
    return data + crc32c(data)


def zarr_targets(folder: Path) -> list[Target]:
    """All kinds of input that only a cache of zarr arrays has; ``folder`` is theirs to write in."""
    box = ZarrBox(folder)
    cases = (_zarr_json, _zarr_slots, _zarr_entry, _zarr_plans, _zarr_chunks)
    found = [Target(case.__name__.strip("_"), case(box), (folder,)) for case in cases]
    return [*found, Target("zarr_index", index_case(box), (folder,))]


def _zarr_json(box: ZarrBox) -> Case:
    """Files for other programs: a reader needs none, a writer and a check look at them."""
    names = sorted(name for name in box.files if name.endswith("zarr.json"))

    def case(random: Random) -> None:
        files = dict(box.files)
        for name in random.sample(names, random.choice((1, 1, 2))):
            value = json.loads(files[name])
            changed = sealed(mutate_json(value, random)) if random.random() < 0.3 else _array(value, random)
            files[name] = spoil_json(files[name], random) if random.random() < 0.1 else changed
        if random.random() < 0.3:
            del files["manifest.json"]
        root = box.lay_out(files)
        random.choice((read_all, check_cache, mend, lambda root: fill_planned(root, box.identity)))(root)

    return case


def _array(value: Any, random: Random) -> bytes:
    """``zarr.json`` in its own spelling with other numbers, which is what a check must not take for right."""
    changed = mutate_json(value, random, 1)
    try:
        changed["shape"][0] = random.choice((changed["shape"][0], *NUMBERS))
        chunks = changed["chunk_grid"]["configuration"]["chunk_shape"]
        chunks[0] = random.choice((chunks[0], *NUMBERS))
    except (KeyError, IndexError, TypeError):
        pass
    try:
        text = json.dumps(changed, sort_keys=True, indent=2, ensure_ascii=False) + "\n"
        return text.encode("utf-8", "surrogatepass")
    except RecursionError:
        return b"{"


def _zarr_slots(box: ZarrBox) -> Case:
    """Head and chunk index of a shard, whose own index is mostly lost: then the file tells of itself."""

    def case(random: Random) -> None:
        name = random.choice(box.indexes)
        head, entries = box.entries(name)
        value = json.loads(head)
        data, records, places = box.shard(head, entries, value["slots"])
        kind = random.randrange(4)
        if kind == 0:
            if random.random() < 0.5:
                value["slots"] = random.choice((*NUMBERS, 5, 1 << 20, (1 << 20) + 1))
            new = _canonical(value) if random.random() < 0.5 else line(json.loads(head), random)
            data, records, places = box.shard(new + b"\n", entries, value_slots(value))
        elif kind == 1:
            at = random.randrange(len(places))
            offset, size = places[at]
            offset, size = (0, 0) if offset > len(data) else (offset, size)
            near = random.choice((-1, 1, -16, 7, len(data)))
            places[at] = random.choice(
                ((offset + near, size), (offset, max(size + near, 0)), _EMPTY, random.choice(places))
            )
        elif kind == 2:
            places[random.randrange(len(places))] = (random.choice(_FAR), random.choice(_FAR))
        else:
            random.shuffle(places)
        end = chunk_index([(max(offset, 0), size) for offset, size in places])
        if random.random() < 0.2:
            end = mutate_bytes(end, random, 1)
        files = box.with_data(name, data + end, records)
        for gone, often in ((name, 0.7), ("manifest.json", 0.7), ("cache.json", 0.3)):
            if random.random() < often:
                del files[gone]
        use(box.lay_out(files), random)

    return case


def value_slots(value: Any) -> int:
    """As many slots as the head says, as far as a test can write them."""
    slots = value.get("slots") if isinstance(value, dict) else 3
    return slots if type(slots) is int and 0 < slots < 100 else 3


def _canonical(value: Any) -> bytes:
    try:
        return canonical_json(value).encode()
    except ValueError:
        return json.dumps(value).encode()


def _zarr_entry(box: ZarrBox) -> Case:
    """Chunk and description of an entry, with everything above agreeing."""

    def case(random: Random) -> None:
        name = random.choice(box.indexes)
        _, entries = box.entries(name)
        at = random.randrange(len(entries))
        _, parts = entries[at]
        if random.random() < 0.5:
            parts[0] = _spoil_chunk(parts[0], random)
        for _, others in entries if random.random() < 0.3 else [entries[at]]:
            if random.random() < 0.6:
                others[1] = _spoil_description(others[1], random)
        if random.random() < 0.1:
            entries.append(random.choice(entries))
        use(box.lay_out(box.with_entries(name, entries)), random)

    return case


def _spoil_description(data: bytes, random: Random) -> bytes:
    value = json.loads(data)
    kind = random.randrange(6)
    if kind == 0:
        value["shape"] = [random.choice(_SIZES) for _ in range(random.choice((0, 1, 2, 4, 70)))]
    elif kind == 1:
        value["dtype"] = random.choice((*DTYPES, "float64", "uint16", *STRINGS))
    elif kind == 2:
        value["compression"] = random.choice(("none", "zstd", "lz4", *STRINGS))
    elif kind == 3:
        value["tensor"] = random.choice(STRINGS)
    else:
        return line(value, random)
    return _canonical(value) if not _has_half(value) else json.dumps(value).encode()


def _has_half(value: Any) -> bool:
    """Whether a lone surrogate is in it, which no UTF-8 can say."""
    return any("\ud800" <= c <= "\udfff" for c in json.dumps(value, ensure_ascii=False))


def _spoil_chunk(chunk: bytes, random: Random) -> bytes:
    """Values or a blosc buffer with a forged header, or damaged behind it; the crc32c is mostly right."""
    body = chunk[:-CRC_SIZE]
    kind = random.randrange(5)
    if kind == 0 or len(body) < _HEADER.size:
        body = mutate_bytes(body, random)
    elif kind == 1:
        body = body[: _HEADER.size] + mutate_bytes(body[_HEADER.size :], random)
        body = _with_field(body, 6, len(body))
    elif kind == 2:  # where the blocks begin, and how long their parts are
        at = _HEADER.size + 4 * random.randrange(4)
        number = random.choice((*_SIZES, len(body), random.getrandbits(32)))
        body = body[:at] + number.to_bytes(4, "little") + body[at + 4 :]
        body = _with_field(body, 6, len(body))
    else:
        for _ in range(random.choice((1, 1, 2))):
            field = random.choice((0, 1, 2, 2, 3, 4, 5, 5, 5, 6))
            body = _with_field(body, field, random.choice((*_SIZES, len(body), random.getrandbits(32))))
    return body + (crc32c(body) if random.random() < 0.9 else chunk[-CRC_SIZE:])


def _with_field(body: bytes, field: int, number: int) -> bytes:
    fields = list(_HEADER.unpack_from(body))
    fields[field] = number & (0xFF if field < 4 else 0xFFFFFFFF)
    return _HEADER.pack(*fields) + body[_HEADER.size :]


def _zarr_chunks(_: ZarrBox) -> Case:
    """The same without a cache around it: the function that takes a chunk."""
    made = []
    for number, (kind, shape) in enumerate(
        (kind, shape) for kind in DTYPES for shape in ((8, 3, 4, 6), (8, 8), (1, 1), (3, 70_000))
    ):
        values = torch.randn(shape, generator=torch.Generator().manual_seed(number))
        tensor = (values.abs() * 3).round().to(getattr(torch, kind))
        made += [(encode(tensor, how), how, shape, kind) for how in ("zstd", "none")]

    def case(random: Random) -> None:
        chunk, how, shape, kind = random.choice(made)
        try:
            tensor = decode(_spoil_chunk(chunk, random), how, shape, kind)
        except ValueError as error:
            raise CacheError(str(error)) from None
        assert tensor.shape == shape

    return case


def _zarr_plans(box: ZarrBox) -> Case:
    """An unfinished shard: its plan with its slots, the lines of its entries and its data file."""
    name = box.indexes[0].removesuffix(".index.jsonl")
    head, entries = box.entries(box.indexes[0])
    slots = json.loads(head)["slots"]
    data, records, _ = box.shard(head, entries, slots)
    lines = [record.model_dump(mode="json") for record in records]
    part = f"{box.data_file(box.indexes[0])}"
    plan = {"shard": name.split("/")[1], "keys": [key for key, _ in entries], "slots": slots}
    files = {k: v for k, v in box.files.items() if k not in (box.indexes[0], part, "manifest.json")}

    def case(random: Random) -> None:
        said, rows, body = sealed(plan), b"".join(map(sealed_line, lines)), data
        kind = random.randrange(5)
        if kind == 0:
            said = sealed({**plan, "slots": random.choice((*NUMBERS, 5, 1 << 20, (1 << 20) + 1))})
        elif kind == 1:
            said = sealed(mutate_json(plan, random))
        elif kind == 2:
            rows = b"".join(sealed_line(mutate_json(row, random)) for row in lines)
        elif kind == 3:
            body = mutate_bytes(data, random)
        else:
            body, new, _ = box.shard(head, [(k, _spoil(p, random)) for k, p in entries], slots)
            rows = b"".join(sealed_line(record.model_dump(mode="json")) for record in new)
        if random.random() < 0.5:
            rows, body = b"", head
        root = box.lay_out(
            {**files, f"{name}.plan.json": said, f"{name}.index.part": rows, f"{part}.part": body}
        )
        random.choice((lambda root: fill_planned(root, box.identity), check_cache, mend))(root)

    return case


def _spoil(parts: list[bytes], random: Random) -> list[bytes]:
    chunk, said = parts
    if random.random() < 0.5:
        return [_spoil_chunk(chunk, random), said]
    return [chunk, _spoil_description(said, random)]
