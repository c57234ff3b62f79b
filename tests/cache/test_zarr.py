"""What only zarr shards can get right or wrong: other readers of them, arrays, and forged chunks."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import verify_kit
from cache_kit import TEXT_KEYS, FakeOs, data_file, data_files, identity, snapshot
from verify_kit import flip, latent_key, tensor_at

from cogcache.cache.check import check_cache
from cogcache.cache.fill import fill_series
from cogcache.cache.format import LATENTS, TEXT, BackendName, Entry, Identity, ZarrCompression
from cogcache.cache.lines import dump_sealed
from cogcache.cache.moments import unpack_moments
from cogcache.cache.reader import CacheReader
from cogcache.cache.repair import repair_cache
from cogcache.cache.transfer import export_shards
from cogcache.cache.writer import CacheWriter
from cogcache.cache.zarr.array import ZarrArray
from cogcache.cache.zarr.chunk import MAX_BYTES, crc32c, decode, encode, sound
from cogcache.errors import CacheError, MismatchError

pytestmark = pytest.mark.parametrize("backend", ["zarr"], indirect=True, scope="session")


@pytest.fixture(autouse=True)
def _zarr(backend: BackendName) -> None:
    assert backend == "zarr"


@pytest.fixture
def stock() -> Any:
    """Stock zarr 3, which Python 3.10 has none of."""
    return pytest.importorskip("zarr", minversion="3.0")


def bits(tensor: torch.Tensor) -> Any:
    """The values as zarr holds them."""
    return (
        tensor.view(torch.int16).numpy().view(np.uint16) if tensor.dtype == torch.bfloat16 else tensor.numpy()
    )


def rows(root: Path, series: str) -> dict[str, int]:
    """Key -> row, as the specification says: row i of shard n is row n * slots + i of the array."""
    found = {}
    for index in (root / series).glob("*.index.jsonl"):
        number = int(index.name.split(".")[0].split("-")[-1])
        head = json.loads(data_file(root, index.name.split(".")[0]).read_bytes().split(b"\n")[0])
        for place, line in enumerate(index.read_text().splitlines()[:-1]):
            found[json.loads(line)["key"]] = number * head["slots"] + place
    return found


@pytest.mark.parametrize(("series", "group"), [(LATENTS, "9x32x48"), (TEXT, "8")])
def test_stock_zarr_reads_the_same(root: Path, stock: Any, series: str, group: str) -> None:
    array = stock.open_group(str(root), mode="r")[series][group]
    reader, values = CacheReader(root), array[:]
    places = rows(root, series)
    assert len(places) == len(reader.keys(series)) == array.shape[0] - list(_empty(values)).count(True)
    for key, row in places.items():
        (tensor,) = reader.read(series, key).tensors.values()
        assert array.shape[1:] == tuple(tensor.shape)
        assert array.dtype == bits(tensor).dtype
        assert np.array_equal(values[row], bits(tensor))
    said = array.attrs["cogcache"]
    assert said["dtype"] == ("bfloat16" if series == LATENTS else "float32")
    assert said["fingerprint"] == reader.manifest.series[series].fingerprint
    assert said["tensor"] == verify_kit.NAMES[series]


def _empty(values: Any) -> Any:
    return ((row == 0x7FC0).all() if row.dtype == np.uint16 else np.isnan(row).all() for row in values)


def test_stock_zarr_notices_a_changed_bit(root: Path, stock: Any) -> None:
    path, start = tensor_at(root, LATENTS, latent_key(3))
    array = stock.open_group(str(root), mode="r")[f"{LATENTS}/9x32x48"]
    row = rows(root, LATENTS)[latent_key(3)]
    assert array[row].shape == verify_kit.SHAPES[LATENTS]
    flip(path, start + 40)
    with pytest.raises(ValueError, match="checksum"):
        array[row]
    flip(path, start + 40)
    flip(path, path.stat().st_size - 10)  # the index of the chunks
    with pytest.raises(ValueError, match="checksum"):
        array[row]


def test_a_row_that_no_shard_holds_is_not_a_number(root: Path, stock: Any) -> None:
    place = rows(root, LATENTS)[latent_key(0)]
    data_file(root, "latents-9x32x48-00000").unlink()
    row = stock.open_group(str(root), mode="r")[f"{LATENTS}/9x32x48"][place]
    assert torch.from_numpy(row.view(np.int16)).view(torch.bfloat16).isnan().all()


def test_there_and_back_is_the_same(root: Path, tmp_path: Path) -> None:
    export_shards(root, tmp_path / "zarr")
    export_shards(root, tmp_path / "tar", backend="webdataset")
    export_shards(tmp_path / "tar", tmp_path / "tar to zarr", backend="zarr")
    export_shards(tmp_path / "tar to zarr", tmp_path / "tar again", backend="webdataset")
    assert snapshot(tmp_path / "tar to zarr") == snapshot(tmp_path / "zarr")
    assert snapshot(tmp_path / "tar again") == snapshot(tmp_path / "tar")
    assert CacheReader(tmp_path / "tar").manifest.backend == "webdataset"
    for name in ("tar", "zarr"):
        assert check_cache(tmp_path / name).report.whole
        reader, first = CacheReader(tmp_path / name), CacheReader(root)
        for series in (LATENTS, TEXT):
            assert all(reader.contents(series, k) == first.contents(series, k) for k in reader.keys(series))


@pytest.mark.parametrize("compression", ["zstd", "none"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_bit_pattern_survives(
    dtype: torch.dtype, compression: ZarrCompression, tmp_path: Path, fast_disk: FakeOs, stock: Any
) -> None:
    """NaN of every payload, infinities, both zeros: a cache keeps bits."""
    assert fast_disk
    whole = torch.arange(-(2**15), 2**15, dtype=torch.int32)
    values = (whole * 65537).view(dtype) if dtype == torch.float32 else whole.to(torch.int16).view(dtype)
    entry = Entry(TEXT_KEYS[0], {"prompt_embeds": values.reshape(-1, 256)}, {"caption": "é\n\u2028"})
    write(tmp_path, TEXT, [entry], compression=compression)
    found = CacheReader(tmp_path).read(TEXT, TEXT_KEYS[0])
    assert found.facts == entry.facts
    raw = found.tensors["prompt_embeds"].view(torch.uint8)
    assert torch.equal(raw, entry.tensors["prompt_embeds"].view(torch.uint8))
    array = stock.open_group(str(tmp_path), mode="r")["text/256"]
    assert array[0].tobytes() == raw.numpy().tobytes()
    (sharding,) = json.loads((tmp_path / "text/256/zarr.json").read_bytes())["codecs"]
    names = [codec["name"] for codec in sharding["configuration"]["codecs"]]
    assert names == ["bytes", *(["blosc"] if compression == "zstd" else []), "crc32c"]


@pytest.mark.parametrize("compression", ["zstd", "none"])
def test_bytes_are_kept_and_a_lost_row_of_them_is_no_number(
    compression: ZarrCompression, tmp_path: Path, fast_disk: FakeOs, stock: Any
) -> None:
    """Moments with 8-bit log-variances. Mutation tried, caught: fill value 0."""
    assert fast_disk
    packed = torch.arange(12 * 3 * 4 * 6).to(torch.uint8).reshape(12, 3, 4, 6)
    entries = [Entry(key * 32, {"moments_8bit": packed + n}, {}) for n, key in enumerate("ab")]
    write(tmp_path, TEXT, [text(0)])
    write(tmp_path, LATENTS, entries, group="9x32x48", slots=1, compression=compression)
    array = stock.open_group(str(tmp_path), mode="r")["latents/9x32x48"]
    assert array.dtype == np.uint8
    reader = CacheReader(tmp_path)
    for row, entry in enumerate(entries):
        assert torch.equal(reader.read(LATENTS, entry.key).tensors["moments_8bit"], packed + row)
        assert np.array_equal(array[row], (packed + row).numpy())
    data_file(tmp_path, "latents-9x32x48-00000").unlink()
    lost = torch.from_numpy(array[0])
    for dtype in ("bfloat16", "float16"):
        assert unpack_moments(lost, dtype)[:4].isnan().all()


def write(
    root: Path,
    series: str,
    entries: list[Entry],
    *,
    group: str = "256",
    slots: int = 4,
    compression: ZarrCompression = "zstd",
) -> None:
    writer = CacheWriter.open(root, identity(), compression)
    fill_series(writer, series, entries, slots, group)
    writer.commit([], [], TEXT_KEYS[0])


def text(number: int, shape: tuple[int, ...] = (2, 256), name: str = "prompt_embeds") -> Entry:
    key = TEXT_KEYS[0] if number == 0 else f"{number:032x}"
    return Entry(key, {name: torch.full(shape, float(number))}, {"n": number})


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        (text(1, (3, 256)), {"shape": ([2, 256], [3, 256])}),
        (text(1, name="other"), {"tensor": ("prompt_embeds", "other")}),
        (
            Entry("1" * 32, {"prompt_embeds": torch.zeros(2, 256).half()}, {}),
            {"dtype": ("float32", "float16")},
        ),
    ],
)
def test_an_entry_of_another_kind_is_refused(
    entry: Entry, said: dict[str, Any], tmp_path: Path, fast_disk: FakeOs
) -> None:
    assert fast_disk
    for number, root in enumerate((tmp_path / "one run", tmp_path / "two runs")):
        if number:
            write(root, TEXT, [text(0)])
        with pytest.raises(MismatchError, match="must be alike") as caught:
            write(root, TEXT, [entry] if number else [text(0), entry])
        assert caught.value.differences == said


@pytest.mark.parametrize(
    "tensors",
    [
        {},
        {"a": torch.zeros(2, 2), "b": torch.zeros(2, 2)},
        {"a": torch.zeros(2, 2, 2)},
        {"a": torch.zeros(0, 2)},
        {"a": torch.zeros(2, 2, dtype=torch.float64)},
    ],
)
def test_an_entry_that_no_array_can_hold_is_refused(
    tensors: dict[str, torch.Tensor], tmp_path: Path, fast_disk: FakeOs
) -> None:
    assert fast_disk
    with pytest.raises(CacheError, match="entry") as caught:
        write(tmp_path, TEXT, [Entry(TEXT_KEYS[0], tensors, {})])
    assert "--format webdataset" in caught.value.hint


def test_a_series_without_known_axes_is_refused(tmp_path: Path) -> None:
    writer = CacheWriter.open(tmp_path, identity(extra={"a": 1}))
    writer.plan("extra", ["0" * 32], 1)
    with pytest.raises(CacheError, match="cannot be kept in zarr"):
        next(writer.jobs("extra", ["0" * 32]))


def test_shards_of_a_group_keep_their_number_of_rows(tmp_path: Path, fast_disk: FakeOs, stock: Any) -> None:
    """Whatever a later run asks for, also where the first shard is not full, is unfinished, or lost its array."""
    assert fast_disk
    write(tmp_path, TEXT, [text(n) for n in range(6)], slots=4)
    (tmp_path / "text/256/zarr.json").unlink()
    write(tmp_path, TEXT, [text(n) for n in range(6, 15)], slots=100)
    heads = [json.loads(path.read_bytes().split(b"\n")[0]) for path in data_files(tmp_path)]
    assert [head["slots"] for head in heads] == [4] * 5
    array = stock.open_group(str(tmp_path), mode="r")["text/256"]
    assert array.shape == (4 * 4 + 1, 2, 256)
    assert [row[0, 0] for row in array[:6]] == [0, 1, 2, 3, 4, 5]
    assert np.isnan(array[6:8]).all()
    writer = CacheWriter.open(tmp_path / "new", identity())
    writer.plan(TEXT, [text(0).key], 4, "256")
    writer.plan(TEXT, [text(1).key, text(2).key], 1, "256")
    assert len(list((tmp_path / "new" / TEXT).glob("*.plan.json"))) == 2


def test_an_array_reaches_to_its_last_committed_row(tmp_path: Path, fast_disk: FakeOs, stock: Any) -> None:
    """Before the cache is committed, and whichever shard is finished first."""
    assert fast_disk
    writer = CacheWriter.open(tmp_path, identity())
    keys = [text(n).key for n in range(4)]
    writer.plan(TEXT, keys, 2, "256")
    jobs = list(writer.jobs(TEXT, keys))
    for number, job in reversed([*enumerate(jobs)]):
        for n in (2 * number, 2 * number + 1):
            job.append(text(n))
        job.finish()
        rows = stock.open_group(str(tmp_path), mode="r")["text/256"][:, 0, 0]
        assert [*rows[2 * number :]] == [*range(2 * number, 4)]
        assert np.isnan(rows[: 2 * number]).all()


def test_a_new_group_takes_the_compression_given_and_an_old_one_keeps_its_own(
    tmp_path: Path, fast_disk: FakeOs
) -> None:
    assert fast_disk
    write(tmp_path, TEXT, [text(0)], compression="none", slots=1)
    write(tmp_path, TEXT, [text(1)], compression="zstd")
    said = json.loads((tmp_path / "text/256/zarr.json").read_bytes())["attributes"]["cogcache"]
    assert said["compression"] == "none"
    reader = CacheReader(tmp_path)
    assert [reader.read(TEXT, text(n).key).tensors["prompt_embeds"][0, 0] for n in (0, 1)] == [0, 1]


@pytest.mark.parametrize("lost", ["zarr.json", "latents/zarr.json", "latents/9x32x48/zarr.json"])
def test_what_tells_other_programs_is_checked_and_made_anew(root: Path, finished: Path, lost: str) -> None:
    for harm in (Path.unlink, lambda path: flip(path, 60)):
        harm(root / lost)
        (damage,) = check_cache(root).report.damages
        assert damage.file == lost
        CacheReader(root)  # our own reader needs none of it
        assert not repair_cache(check_cache(root)).missing
        assert snapshot(root) == snapshot(finished)


def test_a_lost_cache_comes_back_from_data_files_and_tables(root: Path, finished: Path) -> None:
    for path in [
        *root.rglob("zarr.json"),
        *root.rglob("*.index.jsonl"),
        root / "cache.json",
        root / "manifest.json",
    ]:
        path.unlink()
    assert not repair_cache(check_cache(root), "some/model").missing
    assert snapshot(root) == snapshot(finished)


def test_a_kill_between_array_and_index_leaves_a_cache_that_goes_on(root: Path, finished: Path) -> None:
    """The array is ahead of the committed shards for a moment; other programs then see NaN, or the entry."""
    name = "latents-9x32x48-00002"
    (root / "latents" / f"{name}.index.jsonl").unlink()
    (root / "manifest.json").unlink()
    shutil.move(data_file(root, name), f"{data_file(root, name)}.part")
    (root / "latents" / f"{name}.index.part").write_bytes(b"")
    writer = CacheWriter.open(root, verify_kit.identity())
    writer.plan(LATENTS, [latent_key(clip) for clip in range(verify_kit.CLIPS)], 2, "9x32x48")
    assert not [damage for damage in check_cache(root).report.damages if "zarr" in damage.file]
    verify_kit.encode(root)
    assert snapshot(root) == snapshot(finished)


def forged(count: int, body: bytes, *, flags: int = 0x91, width: int = 2, whole: int | None = None) -> bytes:
    return _seal(struct.pack("<BBBBIII", 2, 1, flags, width, count, count, whole or 16 + len(body)) + body)


def _seal(body: bytes) -> bytes:
    return body + crc32c(body)


@pytest.mark.parametrize(
    "chunk",
    [
        b"",
        b"\0" * 4,
        _seal(b"\2\1"),
        forged(2**31 - 17, b"x" * 9),
        forged(24, b"x" * 9),
        forged(24, b"x" * 9, whole=2**32 - 1),
        forged(24, b"x" * 9, width=8),
        forged(24, b"x" * 9, flags=0x31),
        forged(24, b"x" * 9, flags=0x93),
        forged(24, struct.pack("<I", 2**31) + b"x" * 20),
    ],
)
def test_forged_chunks(chunk: bytes) -> None:
    with pytest.raises(ValueError, match="chunk"):
        decode(chunk, "zstd", (3, 4), "bfloat16")
    with pytest.raises(ValueError, match="chunk"):
        decode(chunk, "none", (3, 4), "bfloat16")


def test_forging_itself_is_sound() -> None:
    values = torch.randn(3, 4).bfloat16()
    chunk = forged(24, values.view(torch.uint8).numpy().tobytes(), flags=0x93)
    assert torch.equal(decode(chunk, "zstd", (3, 4), "bfloat16"), values)
    assert sound(chunk)
    assert not sound(chunk[:-1])


@pytest.mark.parametrize("shape", [[], [2, -1], [2, 0], [2.0], "x", [True], [MAX_BYTES], [2**20] * 4])
def test_forged_shapes(shape: object) -> None:
    if shape == []:
        assert ZarrArray.checked("a", "float32", shape, "zstd").shape == ()
        return
    with pytest.raises(ValueError):
        ZarrArray.checked("a", "float32", shape, "zstd")


def test_bytes_do_not_depend_on_the_thread() -> None:
    """Blosc's own threads would write blocks in the order in which they get done."""
    from concurrent.futures import ThreadPoolExecutor

    values = torch.randn(4, 2**18, generator=torch.Generator().manual_seed(0)).bfloat16()
    here = encode(values, "zstd")
    with ThreadPoolExecutor(4) as pool:
        assert all(found == here for found in pool.map(lambda _: encode(values, "zstd"), range(8)))
    assert torch.equal(decode(here, "zstd", (4, 2**18), "bfloat16"), values)


def test_formats_never_mix(root: Path) -> None:
    other = Identity.model_validate({**verify_kit.identity().model_dump(), "backend": "webdataset"})
    with pytest.raises(MismatchError) as caught:
        CacheWriter.open(root, other)
    assert caught.value.differences == {"backend": ("zarr", "webdataset")}


@pytest.mark.parametrize(
    ("wanted", "planned", "expected"), [(7, 3, 7), (10**6, 3, 1024), (10**6, 1500, 1500), (1200, 1500, 1200)]
)
def test_a_new_array_has_room_for_what_is_planned_and_little_more(
    wanted: int, planned: int, expected: int, tmp_path: Path, fast_disk: FakeOs
) -> None:
    """Each slot costs 16 bytes in every shard: a few small entries must not bring megabytes of them."""
    assert fast_disk
    writer = CacheWriter.open(tmp_path, identity())
    writer.plan(TEXT, [f"{n:032x}" for n in range(planned)], wanted, "256")
    assert json.loads((tmp_path / "text/text-256-00000.plan.json").read_text())["slots"] == expected


def test_a_run_that_was_stopped_as_it_began_is_no_damage(root: Path, finished: Path) -> None:
    """``cache.json`` is there, its files for other programs are not yet."""
    for path in root.rglob("zarr.json"):
        path.unlink()
    assert {damage.file for damage in check_cache(root).report.damages} >= {"zarr.json", "text/zarr.json"}
    (root / "manifest.json").unlink()
    assert [damage.file for damage in check_cache(root).report.damages] == ["manifest.json"]
    assert verify_kit.encode(root) == []
    assert snapshot(root) == snapshot(finished)


def test_a_group_whose_first_shard_was_stopped_before_its_index(root: Path, finished: Path) -> None:
    plan = {"shard": "text-8-00000", "slots": 3, "keys": list(verify_kit.facts_by_key()[TEXT])[:3]}
    (root / "text" / "text-8-00000.plan.json").write_bytes(dump_sealed(plan))
    for index in (root / "text").glob("*.index.jsonl"):
        index.unlink()
    assert not [fact for fact in check_cache(root).report.facts if "zarr.json" in fact]
    assert (root / "text" / "8" / "zarr.json").exists()
    assert snapshot(root) != snapshot(finished)
