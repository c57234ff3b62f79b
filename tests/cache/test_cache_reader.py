"""Reading: everything comes back, and nothing that was changed is believed."""

# ruff: noqa: ARG005, S301

from __future__ import annotations

import gc
import hashlib
import json
import multiprocessing
import pickle
import re
import shutil
import struct
import tarfile
import warnings
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import webdataset
from cache_kit import (
    CLIPS,
    LATENT_KEYS,
    TEXT_KEYS,
    VARIANT,
    data_file,
    encode,
    entry,
    identity,
    latent_key,
    sample,
)
from safetensors.torch import load

from cogcache.cache.format import LATENTS, TEXT, Entry, EntryRecord, Manifest, canonical_json
from cogcache.cache.handles import Handles
from cogcache.cache.index import build_index, parse_index
from cogcache.cache.lines import pretty_json
from cogcache.cache.reader import CacheReader
from cogcache.cache.writer import CacheWriter
from cogcache.errors import CacheError, CogcacheError, DamagedCacheError

READABLE = [key for clip, key in enumerate(LATENT_KEYS) if clip != 1]


@pytest.fixture
def cache(undisturbed: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(undisturbed, tmp_path / "cache"))


def check_all(root: Path) -> None:
    """Open and read everything there is."""
    reader = CacheReader(root)
    for series, name in ((LATENTS, "moments"), (TEXT, "moments")):
        for key in reader.keys(series):
            found, expected = reader.read(series, key), entry(key)
            assert found.facts == expected.facts
            assert torch.equal(found.tensors[name], expected.tensors[name])


def test_everything_comes_back(undisturbed: Path) -> None:
    check_all(undisturbed)
    reader = CacheReader(undisturbed)
    assert reader.keys(LATENTS) == READABLE
    assert reader.samples == [sample(clip) for clip in range(CLIPS) if clip != 1]
    assert [row.reason for row in reader.failures] == ["cannot be decoded"]
    assert reader.manifest.unconditional == TEXT_KEYS[0]
    assert reader.damages() == []


@pytest.mark.usefixtures("fast_disk")
def test_dtypes_and_shapes(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(2, 3, 4)
    tensors = {
        "float32": base,
        "float16": base.half(),
        "bfloat16": base.bfloat16(),
        "turned": base.transpose(0, 2),
        "part": base[1, :, ::2],
        "number": torch.tensor(1.5),
        "empty": torch.zeros(0, 3),
        "grad": torch.nn.Parameter(base.clone()),
    }
    writer = CacheWriter.open(tmp_path, identity())
    writer.plan(TEXT, [TEXT_KEYS[0]], 1)
    for job in writer.jobs(TEXT, TEXT_KEYS):
        with job:
            job.append(Entry(TEXT_KEYS[0], tensors, {"é": ["ü", None, 1, 0.1]}))
            job.finish()
    writer.commit([], [], TEXT_KEYS[0])
    found = CacheReader(tmp_path).read(TEXT, TEXT_KEYS[0])
    assert found.facts == {"é": ["ü", None, 1, 0.1]}
    assert found.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found.tensors[name].dtype == tensor.dtype
        assert torch.equal(found.tensors[name], tensor)


def test_unknown_entries(undisturbed: Path) -> None:
    reader = CacheReader(undisturbed)
    for series, key in ((LATENTS, latent_key(99)), ("other", LATENT_KEYS[0]), (LATENTS, "../x")):
        with pytest.raises(CacheError, match="no entry"):
            reader.read(series, key)


def test_no_cache_and_unfinished_caches_are_told_apart(tmp_path: Path, cache: Path) -> None:
    with pytest.raises(CacheError, match="no cache at"):
        CacheReader(tmp_path / "nothing")
    (tmp_path / "other").mkdir()
    with pytest.raises(CacheError, match="not a cache"):
        CacheReader(tmp_path / "other")
    (cache / "manifest.json").unlink()
    with pytest.raises(CacheError, match="not finished") as caught:
        CacheReader(cache)
    assert "Run encode again" in caught.value.hint


def read_some(reader: CacheReader) -> list[float]:
    return [float(reader.read(LATENTS, key).tensors["moments"].float().sum()) for key in READABLE]


def test_threads(undisturbed: Path) -> None:
    reader = CacheReader(undisturbed)
    expected = read_some(reader)
    with ThreadPoolExecutor(8) as pool:
        assert all(result == expected for result in pool.map(lambda _: read_some(reader), range(64)))


def test_threads_with_fewer_handles_than_files(tmp_path: Path) -> None:
    for number in range(20):
        (tmp_path / str(number)).write_bytes(bytes([number]) * 100)
    handles = Handles(limit=2)
    jobs = [(number, offset) for offset in range(50) for number in range(20)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda job: handles.pread(tmp_path / str(job[0]), job[1], 10), jobs))
    assert found == [bytes([number]) * 10 for number, _ in jobs]


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_processes(method: str, undisturbed: Path) -> None:
    reader = CacheReader(undisturbed)
    expected = read_some(reader)
    with multiprocessing.get_context(method).Pool(2) as pool:
        assert pool.map(read_some, [reader] * 4) == [expected] * 4
    assert read_some(reader) == expected
    assert read_some(pickle.loads(pickle.dumps(reader))) == expected


def test_a_plain_webdataset_reads_the_shards(tmp_path: Path) -> None:
    encode(undisturbed := tmp_path / "cache")
    shards = sorted(str(path) for path in (undisturbed / LATENTS).glob("*.tar"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # webdataset leaves closing to the collector
        samples = list(webdataset.WebDataset(shards, shardshuffle=False))
        gc.collect()
    assert [found["__key__"] for found in samples] == READABLE
    for found in samples:
        expected = entry(found["__key__"])
        assert torch.equal(load(found["safetensors"])["moments"], expected.tensors["moments"])
        assert json.loads(found["json"]) == expected.facts


def test_a_shard_says_what_it_is(tmp_path: Path) -> None:
    encode(undisturbed := tmp_path / "cache")
    with tarfile.open(undisturbed / LATENTS / "latents-00000.tar") as shard:
        member = shard.extractfile(shard.getmembers()[0])
        assert member is not None
        value = json.loads(member.read())
    assert value == {
        "format": "cogcache",
        "version": 1,
        "series": LATENTS,
        "variant": VARIANT.model_dump(mode="json"),
        "fingerprint": identity().series[LATENTS],
    }


def flipped(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 1 << place % 8]) + data[place + 1 :]


@pytest.mark.parametrize(
    "name", ["manifest.json", "samples.jsonl", "failures.jsonl", "latents/latents-00001.index.jsonl"]
)
def test_every_bit_beside_the_shards_counts(name: str, cache: Path) -> None:
    whole = (cache / name).read_bytes()
    for place in range(0, len(whole), 5):
        (cache / name).write_bytes(flipped(whole, place))
        with pytest.raises(CacheError):
            CacheReader(cache)
    for end in range(0, len(whole), 50):
        (cache / name).write_bytes(whole[:end])
        with pytest.raises(DamagedCacheError):
            CacheReader(cache)
    (cache / name).unlink()
    with pytest.raises(CacheError):
        CacheReader(cache)


def test_every_bit_of_a_shard_counts(cache: Path) -> None:
    path = data_file(cache, "latents-00000")
    whole = path.read_bytes()
    index = parse_index((cache / LATENTS / "latents-00000.index.jsonl").read_bytes())
    spans = [(offset, offset + size) for members in index.entries.values() for _, offset, size, _ in members]
    seen = 0
    for place in range(0, len(whole), 7):
        path.write_bytes(flipped(whole, place))
        reader = CacheReader(cache)
        assert len(reader.damages()) == 1
        if any(start <= place < end for start, end in spans):
            seen += 1
            with pytest.raises(DamagedCacheError, match="checksum"):
                check_all(cache)
    assert seen > 40


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.unlink(),
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(path.read_bytes() + b"\0"),
        lambda path: (path.unlink(), path.mkdir()),
        lambda path: path.write_bytes(b""),
    ],
)
def test_missing_and_cut_shards(damage: Callable[[Path], object], cache: Path) -> None:
    path = data_file(cache, "latents-00001")
    damage(path)
    with pytest.raises(DamagedCacheError, match=re.escape(path.name)) as caught:
        CacheReader(cache)
    assert "run encode again" in caught.value.hint


def test_a_shard_cut_while_it_is_open(cache: Path) -> None:
    reader = CacheReader(cache)
    path = data_file(cache, "latents-00001")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 4])
    with pytest.raises(DamagedCacheError):
        reader.read(LATENTS, LATENT_KEYS[4])
    path.unlink()
    with pytest.raises(DamagedCacheError):
        CacheReader.read(pickle.loads(pickle.dumps(reader)), LATENTS, LATENT_KEYS[4])
    assert len(reader.damages()) == 1


def reseal(root: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest as someone would who knows the checksum."""
    path = root / "manifest.json"
    value = json.loads(path.read_text())
    change(value)
    del value["checksum"]
    value["checksum"] = hashlib.sha256(canonical_json(value).encode()).hexdigest()
    path.write_bytes(pretty_json(value))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["series"].update({"../outside": m["series"].pop("latents")}), "not a name for a series"),
        (
            lambda m: m["series"]["latents"]["shards"][0].update(name="../../etc/passwd"),
            "not a name for a shard",
        ),
        (lambda m: m["series"]["latents"]["shards"][0].update(name="text-00000"), "not a name for a shard"),
        (
            lambda m: m["series"]["latents"]["shards"].append(m["series"]["latents"]["shards"][0]),
            "two shards",
        ),
        (lambda m: m["series"]["latents"]["shards"].pop(), "no entry"),
        (lambda m: m["series"]["latents"]["shards"][0].update(entries=9), "not the one"),
        (lambda m: m.update(unconditional=LATENT_KEYS[0]), "no entry"),
        (lambda m: m["tables"].pop("samples.jsonl"), r"names no samples\.jsonl"),
        (lambda m: m["tables"]["samples.jsonl"].update(rows=1), "rows"),
        (lambda m: m.update(version=2), "version 2"),
        (lambda m: m.update(version="1"), "damaged"),
        (lambda m: m.update(more=1), "damaged"),
        (lambda m: m["model"]["variant"].pop("ofs"), "damaged"),
    ],
)
def test_forged_manifests(change: Callable[[dict[str, object]], object], message: str, cache: Path) -> None:
    reseal(cache, change)
    with pytest.raises(CacheError, match=message):
        CacheReader(cache)


def forge(root: Path, change: Callable[[bytearray, list[EntryRecord]], object]) -> None:
    """Rewrite the text shard with every hash right, as someone would who wants to harm the reader."""
    path, listed = data_file(root, "text-00000"), root / TEXT / "text-00000.index.jsonl"
    lines = listed.read_text().splitlines()[:-1]
    records = [EntryRecord.model_validate_json(line) for line in lines]
    data = bytearray(path.read_bytes())
    change(data, records)
    path.write_bytes(data)
    index = build_index(records, len(data), hashlib.sha256(data).hexdigest())
    listed.write_bytes(index)
    try:
        record = parse_index(index).record("text-00000").model_dump(mode="json")
    except ValueError:
        record = {
            "name": "text-00000",
            "entries": len(records),
            "bytes": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
            "index_sha256": hashlib.sha256(index).hexdigest(),
        }
    reseal(root, lambda m: m["series"][TEXT].update(shards=[record]))


def member(records: list[EntryRecord], number: int = 0, **update: object) -> None:
    members = list(records[0].members)
    members[number] = members[number].model_copy(update=update)
    records[0] = records[0].model_copy(update={"members": tuple(members)})


def content(data: bytearray, records: list[EntryRecord], new: bytes, number: int = 0) -> None:
    offset, size = records[0].members[number].offset, records[0].members[number].size
    new = new[:size].ljust(size)
    data[offset : offset + size] = new
    member(records, number, crc32=zlib.crc32(new))


HEADER = b'{"a":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,4398046511104]}}'


@pytest.mark.parametrize(
    "change",
    [
        lambda data, records: member(records, size=1 << 60),
        lambda data, records: member(records, offset=1 << 60),
        lambda data, records: member(records, offset=-1),
        lambda data, records: member(records, size=-5),
        lambda data, records: member(records, name="../../x.safetensors"),
        lambda data, records: member(records, name=records[1].members[0].name),
        lambda data, records: member(records, name=records[0].key + ".pickle"),
        lambda data, records: member(records, size=10),
        lambda data, records: records.append(records[0]),
        lambda data, records: records.__setitem__(0, records[0].model_copy(update={"key": "x"})),
        lambda data, records: records.__setitem__(0, records[0].model_copy(update={"members": ()})),
        lambda data, records: content(data, records, struct.pack("<Q", 1 << 62)),
        lambda data, records: content(data, records, struct.pack("<Q", len(HEADER)) + HEADER),
        lambda data, records: content(data, records, b"\x80\x04cos\nsystem\n(S'true'\ntR."),
        lambda data, records: content(data, records, b"[1]", 1),
        lambda data, records: content(data, records, b'{"a":NaN}', 1),
        lambda data, records: content(data, records, b"[" * 4000, 1),
        lambda data, records: content(data, records, b'{"a":"\xff"}', 1),
    ],
)
def test_forged_shards(change: Callable[[bytearray, list[EntryRecord]], object], cache: Path) -> None:
    forge(cache, change)
    with pytest.raises(DamagedCacheError):
        check_all(cache)


def test_forging_itself_is_sound(cache: Path) -> None:
    forge(cache, lambda data, records: None)
    check_all(cache)


def open_both_ways(root: Path) -> None:
    CacheWriter.open(root, identity(root)).plan(LATENTS, LATENT_KEYS, 3)
    CacheReader(root)


@pytest.mark.parametrize("text", ["", "null", "[]", "[" * 100_000, '{"a":' * 100_000, "\xff", "1e999", "{}"])
@pytest.mark.parametrize("name", ["manifest.json", "cache.json", "latents/latents-00000.index.jsonl"])
def test_nonsense_files(name: str, text: str, cache: Path) -> None:
    (cache / name).write_text(text, "latin-1")
    with pytest.raises(CogcacheError):
        open_both_ways(cache)


def test_tables_that_wait_for_their_name_are_found(cache: Path) -> None:
    before = CacheReader(cache).samples
    (cache / "samples.jsonl").rename(cache / "samples.jsonl.next")
    (cache / "samples.jsonl").write_text("older\n")
    assert CacheReader(cache).samples == before


def test_the_manifest_is_its_own_record(undisturbed: Path) -> None:
    manifest = Manifest.model_validate_json((undisturbed / "manifest.json").read_text())
    assert manifest == CacheReader(undisturbed).manifest
    assert manifest.sealed() == manifest


def test_facts_and_contents_are_those_of_the_entry(undisturbed: Path) -> None:
    """Facts are read without the tensors; contents are the stored bytes."""
    reader = CacheReader(undisturbed)
    key = latent_key(0)
    whole = reader.read(LATENTS, key)
    assert reader.facts(LATENTS, key) == whole.facts
    tensors, facts = reader.contents(LATENTS, key)
    assert torch.equal(load(tensors)["moments"], whole.tensors["moments"])
    assert json.loads(facts) == whole.facts
