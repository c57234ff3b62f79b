"""Hostile caches: valid ones in which one file is changed, and every checksum above it made right again.

A mere change is stopped by the checksum; only what is sealed anew reaches the code behind it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

import cache_kit
import verify_kit
from hostile_kit import Case, Target
from hostile_mutations import NUMBERS, STRINGS, mutate_bytes, mutate_json, mutate_text, spoil_json

from cogcache.cache import tar
from cogcache.cache.backend import backend_of
from cogcache.cache.check import check_cache
from cogcache.cache.contents import Expectation, content_fault
from cogcache.cache.format import (
    FAILURES_FILE,
    SAMPLES_FILE,
    VALIDATION_FILE,
    BackendName,
    Identity,
    canonical_json,
)
from cogcache.cache.index import build_index, parse_index
from cogcache.cache.journal import Journal
from cogcache.cache.lines import dump_sealed, pretty_json, seal_line, unseal_line
from cogcache.cache.reader import CacheReader
from cogcache.cache.repair import repair_cache
from cogcache.cache.writer import CacheWriter

__all__ = [
    "CacheBox",
    "cache_targets",
    "careless",
    "clear",
    "fill_planned",
    "index_case",
    "line",
    "mend",
    "read_all",
    "sealed",
    "sealed_line",
    "spoil_tensors",
    "use",
]

Files = dict[str, bytes]


def sealed(value: Any) -> bytes:
    """A sealed file of any value; where it cannot be sealed, as a careless program would write it."""
    try:
        return dump_sealed(value) if isinstance(value, dict) else pretty_json(value)
    except (ValueError, TypeError, RecursionError):
        return careless(value)


def sealed_line(value: Any) -> bytes:
    """A sealed line of any value, or what comes nearest."""
    try:
        return seal_line(value) if isinstance(value, dict) else canonical_json(value).encode() + b"\n"
    except (ValueError, TypeError, RecursionError):
        return careless(value) + b"\n"


def careless(value: Any) -> bytes:
    """JSON with NaN and lone surrogates."""
    try:
        return json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")
    except RecursionError:
        return b"[" * 2000 + b"]" * 2000


def line(value: Any, random: Random) -> bytes:
    """A line of a table or an index, changed in its tree or in its text."""
    if random.random() < 0.3:
        return spoil_json(canonical_json(value).encode(), random)
    changed = mutate_json(value, random)
    try:
        return canonical_json(changed).encode()
    except (ValueError, RecursionError):
        return careless(changed)


def clear(folder: Path) -> None:
    """Remove all in a folder by full paths, which the guard can judge."""
    for entry in os.scandir(folder):
        if entry.is_dir(follow_symlinks=False):
            clear(Path(entry.path))
            Path(entry.path).rmdir()
        else:
            Path(entry.path).unlink()


class CacheBox:
    """A small finished cache and one folder in which variants of it are laid out."""

    kind: BackendName = "webdataset"

    def __init__(self, folder: Path) -> None:
        self.backend = backend_of(self.kind)
        self.identity = verify_kit.IDENTITY.model_copy(update={"backend": self.kind})
        folder.mkdir(exist_ok=True)
        self.root = folder / "cache"
        self.made = folder / "made"
        with mock.patch.object(cache_kit, "BACKEND", self.kind):
            verify_kit.encode(self.made)
        self.files = {
            path.relative_to(self.made).as_posix(): path.read_bytes()
            for path in self.made.rglob("*")
            if path.is_file()
        }
        self.indexes = sorted(name for name in self.files if name.endswith(".index.jsonl"))
        shutil.rmtree(self.made)

    def lay_out(self, files: Files) -> Path:
        """A folder with just these files."""
        if self.root.exists():
            clear(self.root)
        for name, data in files.items():
            path = self.root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        return self.root

    def manifest(self) -> dict[str, Any]:
        """The manifest without its checksum."""
        value: dict[str, Any] = json.loads(self.files["manifest.json"])
        value.pop("checksum")
        return value

    def with_table(self, name: str, data: bytes) -> Files:
        """All files, with another table that the manifest names."""
        manifest = self.manifest()
        manifest["tables"][name] = {"rows": data.count(b"\n"), "sha256": hashlib.sha256(data).hexdigest()}
        return {**self.files, name: data, "manifest.json": sealed(manifest)}

    def with_index(self, name: str, data: bytes, archive: bytes | None = None, **record: Any) -> Files:
        """All files, with another index (and archive) that the manifest names."""
        series, shard = name.removesuffix(".index.jsonl").split("/")
        manifest = self.manifest()
        for row in manifest["series"][series]["shards"]:
            if row["name"] == shard:
                row.update(record, index_sha256=hashlib.sha256(data).hexdigest())
        changed = {name: data, "manifest.json": sealed(manifest)}
        return {**self.files, **changed} | ({self.data_file(name): archive} if archive is not None else {})

    def data_file(self, index: str) -> str:
        """Name of the data file of the shard with this index."""
        series, shard = index.removesuffix(".index.jsonl").split("/")
        return f"{series}/{self.backend.data_file(shard)}"

    def entries(self, name: str) -> tuple[bytes, list[tuple[str, list[bytes]]]]:
        """The first member of the shard with this index, and the contents of its entries."""
        archive = self.files[name.replace(".index.jsonl", ".tar")]
        index = parse_index(self.files[name])
        first = min(members[0][1] for members in index.entries.values()) - tar.BLOCK
        contents = [
            (key, [archive[o : o + s] for _, o, s, _ in members]) for key, members in index.entries.items()
        ]
        return archive[:first], contents

    def with_entries(self, name: str, entries: list[tuple[str, list[bytes]]]) -> Files:
        """All files, where the shard holds these entries and everything above agrees."""
        archive, records = self.entries(name)[0], []
        for key, contents in entries:
            data, record = tar.TarLayout(name, {}).pack_contents(
                key, (contents[0], contents[1]), len(archive)
            )
            archive += data
            records.append(record)
        archive += tar.END
        digest = hashlib.sha256(archive).hexdigest()
        data = build_index(records, len(archive), digest)
        return self.with_index(name, data, archive, bytes=len(archive), sha256=digest, entries=len(records))


def read_all(root: Path) -> None:
    """Everything that training reads, and the hashes of the shards."""
    reader = CacheReader(root)
    for series in reader.manifest.series:
        for key in reader.keys(series):
            reader.facts(series, key)
            reader.read(series, key)
    reader.damages()


def mend(root: Path) -> None:
    """Check, repair, check again."""
    checked = check_cache(root)
    json.dumps(checked.report.to_json(), allow_nan=False)
    "\n".join(checked.report.lines())
    if not checked.report.whole:
        repair_cache(checked)
        check_cache(root)


def use(root: Path, random: Random) -> None:
    """One of the commands that take a cache."""
    random.choice((read_all, read_all, check_cache, mend))(root)


def cache_targets(folder: Path) -> list[Target]:
    """All kinds of input that lie in a cache; ``folder`` is theirs to write in."""
    box = CacheBox(folder)
    cases = (
        _manifest,
        _identity,
        _tables,
        index_case,
        _archive,
        _entry,
        _plans,
        _damaged_pair,
        _journal,
        _safetensors,
    )
    return [Target(case.__name__.strip("_").removesuffix("_case"), case(box), (folder,)) for case in cases]


def _manifest(box: CacheBox) -> Case:
    def case(random: Random) -> None:
        value = box.manifest()
        data = (
            spoil_json(sealed(value), random) if random.random() < 0.1 else sealed(mutate_json(value, random))
        )
        use(box.lay_out({**box.files, "manifest.json": data}), random)

    return case


def _identity(box: CacheBox) -> Case:
    def case(random: Random) -> None:
        value = json.loads(box.files["cache.json"])
        value.pop("checksum")
        data = (
            spoil_json(sealed(value), random) if random.random() < 0.1 else sealed(mutate_json(value, random))
        )
        files = {**box.files, "cache.json": data}
        for name in ("manifest.json", *box.indexes):
            if random.random() < 0.5:
                del files[name]
        root = box.lay_out(files)
        if random.random() < 0.3:
            CacheWriter.open(root, verify_kit.IDENTITY)
        else:
            use(root, random)

    return case


def _tables(box: CacheBox) -> Case:
    def case(random: Random) -> None:
        name = random.choice((SAMPLES_FILE, SAMPLES_FILE, FAILURES_FILE, VALIDATION_FILE))
        lines = box.files[name].split(b"\n")[:-1]
        for _ in range(random.choice((1, 1, 3))):
            at = random.randrange(len(lines))
            lines[at] = line(json.loads(box.files[name].split(b"\n")[at]), random)
        data = b"".join(text + b"\n" for text in lines)
        files = box.with_table(name, data)
        if random.random() < 0.3:
            del files["manifest.json"]
        use(box.lay_out(files), random)

    return case


def index_case(box: CacheBox) -> Case:
    def case(random: Random) -> None:
        name = random.choice(box.indexes)
        *lines, last = box.files[name].split(b"\n")[:-1]
        end = unseal_line(last + b"\n")
        assert end
        at = random.randrange(len(lines))
        if random.random() < 0.7:
            lines[at] = line(json.loads(lines[at]), random)
        elif random.random() < 0.5:
            lines[at], end["end"]["bytes"] = (
                _forged_size(lines[at], random),
                random.choice((1 << 62, 1 << 90)),
            )
        body = b"".join(text + b"\n" for text in lines)
        end["end"]["lines_sha256"] = hashlib.sha256(body).hexdigest()
        if random.random() < 0.3:
            end["end"]["bytes"] = random.choice((*NUMBERS, 1 << 60))
        if random.random() < 0.2:
            end = mutate_json(end, random)
        files = box.with_index(name, body + sealed_line(end), **_named(end))
        if random.random() < 0.3:
            del files["manifest.json"]
        use(box.lay_out(files), random)

    return case


def _forged_size(text: bytes, random: Random) -> bytes:
    value = json.loads(text)
    member = random.choice(value["members"])
    member[random.choice(("size", "offset"))] = random.choice((1 << 40, (1 << 62) - 5000, 1 << 63, 1 << 70))
    return canonical_json(value).encode()


def _named(end: Any) -> dict[str, Any]:
    """What the manifest must say for this last line of an index."""
    try:
        return {name: end["end"][name] for name in ("bytes", "sha256", "entries")}
    except (KeyError, TypeError):
        return {}


def _archive(box: CacheBox) -> Case:
    """The walk of an archive without index: headers are changed and their checksums made right."""

    def case(random: Random) -> None:
        name = random.choice(box.indexes)
        archive = bytearray(box.files[name.replace(".index.jsonl", ".tar")])
        starts = [0, *(m[1] - tar.BLOCK for ms in parse_index(box.files[name]).entries.values() for m in ms)]
        for _ in range(random.choice((1, 1, 2))):
            start = random.choice(starts)
            header = bytearray(archive[start : start + tar.BLOCK])
            _spoil_header(header, random)
            archive[start : start + tar.BLOCK] = header
        if random.random() < 0.2:
            archive = bytearray(mutate_bytes(bytes(archive), random, 1))
        files = {**box.files, name.replace(".index.jsonl", ".tar"): bytes(archive)}
        for gone in (name, "manifest.json", *(["cache.json"] if random.random() < 0.3 else [])):
            del files[gone]
        random.choice((check_cache, mend))(box.lay_out(files))

    return case


_FIELDS = {
    "name": (0, 100),
    "mode": (100, 8),
    "size": (124, 12),
    "type": (156, 1),
    "link": (157, 100),
    "magic": (257, 8),
}
_SIZES = (
    b"77777777777\0",
    b"-0000000001\0",
    b"\x80" + b"\xff" * 11,
    b"\xff" * 12,
    b"\x80" + b"\0" * 3 + b"\x7f" * 8,
)


def _spoil_header(header: bytearray, random: Random) -> None:
    at, width = _FIELDS[random.choice((*_FIELDS, "size", "type"))]
    if at == 124 and random.random() < 0.7:
        value = random.choice((*_SIZES, f"{random.choice((0, 1, 511, 513, 1 << 30)):011o}\0".encode()))
    elif at == 156:
        value = bytes([random.choice(b"0123456789gxLKSV\0\xff")])
    elif at == 0:
        value = random.choice(STRINGS).encode("utf-8", "surrogatepass")
    else:
        value = bytes(random.choice((0, 32, 47, 48, 55, 255)) for _ in range(width))
    header[at : at + width] = value[:width].ljust(width, b"\0")
    if random.random() < 0.95:
        header[148:156] = b" " * 8
        header[148:156] = f"{sum(header):06o}\0 ".encode()


def _entry(box: CacheBox) -> Case:
    """Tensors and facts of an entry, with everything above agreeing."""

    def case(random: Random) -> None:
        name = random.choice(box.indexes)
        _, entries = box.entries(name)
        _, contents = random.choice(entries)
        if random.random() < 0.6:
            contents[0] = spoil_tensors(contents[0], random)
        else:
            contents[1] = line(json.loads(contents[1]), random)
        use(box.lay_out(box.with_entries(name, entries)), random)

    return case


def spoil_tensors(data: bytes, random: Random) -> bytes:
    """Bytes of a safetensors file with a hostile header, of which the length is mostly right."""
    length = int.from_bytes(data[:8], "little")
    header, rest = json.loads(data[8 : 8 + length]), data[8 + length :]
    kind = random.randrange(10)
    if kind == 0:
        return mutate_bytes(data, random)
    if kind == 1:
        text = spoil_json(json.dumps(header).encode(), random)
    elif kind == 2:
        fields = header[next(iter(header))]
        fields["shape"] = [
            random.choice((0, 1, 1 << 31, 1 << 62, 1 << 63, -1)) for _ in range(random.choice((0, 1, 4, 70)))
        ]
        fields["data_offsets"] = [0, random.choice((0, len(rest), 1 << 60))]
        text = json.dumps(header).encode()
    elif kind == 3:
        fields = header[next(iter(header))]
        fields["dtype"] = random.choice(
            ("F8_E4M3", "F4", "F6_E2M3", "BOOL", "I64", "U64", "C64", "F64", "X", "", 3, None)
        )
        text = json.dumps(header).encode()
    else:
        text = careless(mutate_json(header, random))
    forged = random.choice((1 << 60, 1 << 63, (1 << 64) - 1, 0, len(text) + 1, len(data)))
    size = forged if random.random() < 0.15 else len(text)
    return size.to_bytes(8, "little") + text + (rest[:-3] if random.random() < 0.1 else rest)


def _safetensors(box: CacheBox) -> Case:
    """The same without a cache around it: the function that takes the two contents."""
    made = []
    for name in box.indexes:
        series = name.split("/")[0]
        print_ = verify_kit.IDENTITY.series[series]
        expected = Expectation(series, verify_kit.VARIANT, print_)
        made += [(expected, key, contents) for key, contents in box.entries(name)[1]]

    def case(random: Random) -> None:
        expected, key, (data, facts) = random.choice(made)
        if random.random() < 0.8:
            data = spoil_tensors(data, random)
        else:
            facts = line(json.loads(facts), random)
        content_fault(expected, key, (data, facts))

    return case


def _plans(box: CacheBox) -> Case:
    """An unfinished shard: its plan, the lines of its entries and its archive."""
    name = box.indexes[0].removesuffix(".index.jsonl")
    index = parse_index(box.files[f"{name}.index.jsonl"])
    members = ("name", "offset", "size", "crc32")
    lines = [
        {"key": key, "members": [dict(zip(members, m, strict=True)) for m in ms]}
        for key, ms in index.entries.items()
    ]
    archive = box.files[f"{name}.tar"].removesuffix(tar.END)
    files = {k: v for k, v in box.files.items() if not k.startswith(f"{name}.") and k != "manifest.json"}
    plan = {"shard": name.split("/")[1], "keys": list(index.entries)}

    def case(random: Random) -> None:
        keys, rows, part = sealed(plan), b"".join(map(sealed_line, lines)), archive
        kind = random.randrange(4)
        if kind == 0:
            keys = spoil_json(keys, random) if random.random() < 0.1 else sealed(mutate_json(plan, random))
        elif kind < 3:
            rows = b"".join(
                sealed_line(mutate_json(row, random) if random.random() < 0.7 else row) for row in lines
            )
        else:
            part = mutate_bytes(part, random)
        new = {f"{name}.plan.json": keys, f"{name}.index.part": rows, f"{name}.tar.part": part}
        root = box.lay_out({**files, **new})
        random.choice((fill_planned, fill_planned, check_cache, mend))(root)

    return case


def fill_planned(root: Path, identity: Identity = verify_kit.IDENTITY) -> None:
    """What encode does with a cache that is not finished."""
    writer = CacheWriter.open(root, identity)
    facts = verify_kit.facts_by_key()
    for series in facts:
        writer.committed(series)
        writer.plan(series, list(facts[series]), 2)
        for job in writer.jobs(series, facts[series]):
            with job:
                for key in job.remaining:
                    job.append(verify_kit.make_entry(series, key, facts[series].get(key, {})))
                job.finish()
    writer.failures()


def _damaged_pair(box: CacheBox) -> Case:
    """What a stopped repair left: a shard set aside with a list of its good entries."""

    def case(random: Random) -> None:
        name = random.choice(box.indexes).removesuffix(".index.jsonl")
        files = {k: v for k, v in box.files.items() if not k.startswith(f"{name}.") and k != "manifest.json"}
        index, archive = box.files[f"{name}.index.jsonl"], box.files[f"{name}.tar"]
        *lines, _ = index.split(b"\n")[:-1]
        at = random.randrange(len(lines))
        lines[at] = line(json.loads(lines[at]), random)
        body = b"".join(text + b"\n" for text in lines)
        end = {"bytes": random.choice((len(archive), *NUMBERS)), "entries": len(lines)}
        end |= {
            "lines_sha256": hashlib.sha256(body).hexdigest(),
            "sha256": hashlib.sha256(archive).hexdigest(),
        }
        files[f"{name}.index.damaged"] = body + sealed_line({"end": end})
        files[f"{name}.tar.damaged"] = mutate_bytes(archive, random, 1) if random.random() < 0.3 else archive
        mend(box.lay_out(files))

    return case


def _journal(box: CacheBox) -> Case:
    lines = [unseal_line(text + b"\n") for text in box.files["journal.jsonl"].split(b"\n")[:-1]]

    def case(random: Random) -> None:
        rows = []
        for value in lines:
            kind = random.randrange(6)
            if kind == 0:
                rows.append(mutate_bytes(sealed_line(value), random, 1))
            elif kind == 1:
                rows.append(spoil_json(sealed_line(value), random))
            else:
                rows.append(sealed_line(mutate_json(value, random) if kind < 5 else value))
        if random.random() < 0.05:
            rows.append(b"x" * 3_000_000 + b"\n")
        data = b"".join(rows)
        if random.random() < 0.1:
            return mend(box.lay_out({**box.files, "journal.jsonl": data}))
        box.root.mkdir(exist_ok=True)
        path = box.root / "journal.jsonl"
        path.write_bytes(data)
        journal = Journal(path)
        journal.reasons()
        journal.add(
            "failed",
            series="latents",
            shard="x",
            key="\udc80",
            source="\ud800",
            reason=mutate_text("a", random),
        )
        return None

    return case
