"""Verify finds what is wrong with a cache, and says where and whose it is."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest
import verify_kit
from cache_kit import FakeOs, data_file, data_files, snapshot
from verify_kit import CLIPS, encode, flip, flip_tensor, identity, latent_key, make_entry, text_key

from cogcache.cache.check import check_cache
from cogcache.cache.format import LATENTS, TEXT, BackendName, Entry
from cogcache.cache.reader import CacheReader
from cogcache.cache.writer import CacheWriter
from cogcache.cli import run
from cogcache.errors import CacheError


def test_whole_cache_is_whole_and_untouched(root: Path) -> None:
    before, times = snapshot(root), [path.stat().st_mtime_ns for path in sorted(root.rglob("*"))]
    read: list[int] = []
    report = check_cache(root, read.append).report
    assert report.whole
    assert not report.facts
    assert report.counts["samples"] == CLIPS
    assert report.counts["entries"] == len(CacheReader(root).keys(LATENTS)) + len(
        CacheReader(root).keys(TEXT)
    )
    assert sum(read) == report.counts["bytes"] == sum(path.stat().st_size for path in data_files(root))
    assert snapshot(root) == before
    assert [path.stat().st_mtime_ns for path in sorted(root.rglob("*"))] == times


def test_damaged_member_is_named_with_its_clip(root: Path) -> None:
    flip_tensor(root, LATENTS, latent_key(3))
    (damage,) = check_cache(root).report.damages
    file = data_file(root, "latents-9x32x48-00001").relative_to(root).as_posix()
    assert (damage.file, damage.shard) == (file, "latents-9x32x48-00001")
    assert (damage.key, damage.clips) == (latent_key(3), ("3.mp4",))


def test_damaged_caption_is_of_every_clip_that_has_it(root: Path) -> None:
    flip_tensor(root, TEXT, text_key("caption 1"))
    (damage,) = check_cache(root).report.damages
    assert sorted(damage.clips) == ["2.mp4", "3.mp4"]


@pytest.mark.parametrize(
    "name", ["manifest.json", "cache.json", "samples.jsonl", "failures.jsonl", "validation.jsonl"]
)
def test_lost_file_is_named(root: Path, name: str) -> None:
    (root / name).unlink()
    assert name in [damage.file for damage in check_cache(root).report.damages]


@pytest.mark.parametrize("part", ["data", "index"])
def test_lost_shard_file_is_named(root: Path, part: str) -> None:
    path = (
        root / "latents" / "latents-9x32x48-00001.index.jsonl"
        if part == "index"
        else data_file(root, "latents-9x32x48-00001")
    )
    path.unlink()
    damages = check_cache(root).report.damages
    assert [damage.file for damage in damages] == [path.relative_to(root).as_posix()]


def test_shard_of_another_size(root: Path) -> None:
    for change in (-1, 1, 5000):
        shard = data_file(root, "latents-9x32x48-00001")
        data = shard.read_bytes()
        shard.write_bytes(data[:change] if change < 0 else data + bytes(change))
        assert check_cache(root).report.damages
        shard.write_bytes(data)
    assert check_cache(root).report.whole


def test_values_that_are_not_finite(tmp_path: Path, fast_disk: FakeOs, backend: BackendName) -> None:
    assert fast_disk
    assert backend
    encode(tmp_path / "cache", damaged=[latent_key(2)])
    CacheReader(tmp_path / "cache").read(LATENTS, latent_key(2))  # its checksums are right
    (damage,) = check_cache(tmp_path / "cache").report.damages
    assert "not finite" in damage.what
    assert damage.clips == ("2.mp4",)


@pytest.mark.parametrize(
    ("change", "said"),
    [("shape", "shape"), ("dtype", "float16"), ("facts", "another key"), ("name", "tensors")],
)
def test_entry_of_another_form(
    tmp_path: Path, fast_disk: FakeOs, change: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert fast_disk

    def other(series: str, key: str, facts: dict[str, object]) -> Entry:
        entry = make_entry(series, key, facts)
        tensor = entry.tensors[verify_kit.NAMES[series]]
        if key != latent_key(2):
            return entry
        tensors = {
            "moments": tensor[:, :2] if change == "shape" else tensor.half() if change == "dtype" else tensor
        }
        if change == "name":
            tensors = {"momenta": tensor}
        return Entry(key, tensors, {**facts, "sha256": "sha of 4"} if change == "facts" else facts)

    monkeypatch.setattr(verify_kit, "make_entry", other)
    encode(tmp_path / "cache")
    (damage,) = check_cache(tmp_path / "cache").report.damages
    assert said in damage.what
    assert damage.key == latent_key(2)


def test_strangers_and_unfinished_shards_are_no_damage(root: Path) -> None:
    (root / "notes.txt").write_text("mine")
    (root / "samples.jsonl.next").write_text("waiting")
    writer = CacheWriter.open(root, identity())
    writer.plan(TEXT, ["ab" * 16], 1)
    report = check_cache(root).report
    assert report.whole
    assert len(report.facts) == 3
    (root / "text" / "text-8-00002.plan.json").write_text("{}")
    assert [damage.shard for damage in check_cache(root).report.damages] == ["text-8-00002"]


def test_not_a_cache(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="not a cache"):
        check_cache(tmp_path)


def test_command(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["verify", str(root)]) == 0
    assert capsys.readouterr().out.endswith("MB read. No damage.\n")
    flip_tensor(root, LATENTS, latent_key(3))
    assert run(["verify", str(root)]) == 5
    told = capsys.readouterr()
    assert (
        f"damaged  {data_file(root, 'latents-9x32x48-00001').relative_to(root)}: a member is cut" in told.out
    )
    assert f"(entry {latent_key(3)}) [3.mp4]" in told.out
    assert "1 damage, listed above" in told.err
    assert "--repair" in told.err
    assert run(["verify", str(root), "--json"]) == 5
    report = json.loads(capsys.readouterr().out)
    assert [damage["key"] for damage in report["damages"]] == [latent_key(3)]
    assert not report["whole"]
    assert run(["verify", str(root), "--repair"]) == 3
    assert "repaired latents-9x32x48-00001 was damaged: 1 good entries were kept" in capsys.readouterr().out
    assert run(["verify", str(root), "--repair", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["whole"]
    encode(root)
    (root / "manifest.json").unlink()
    assert run(["verify", str(root), "--repair"]) == 0
    assert "the journal proves it" in capsys.readouterr().out
    assert run(["verify", str(root / "nothing")]) == 2


def flips(root: Path, count: int, seed: int) -> None:
    """Every single-bit flip in any file that the specification names is found."""
    named = [path for path in root.rglob("*") if path.suffix in (".json", ".jsonl")]
    files = sorted([*named, *data_files(root)])
    assert {path.name for path in files} > {"cache.json", "manifest.json", "journal.jsonl", "samples.jsonl"}
    dice = random.Random(seed)
    for number in range(count):
        path = files[number % len(files)]
        data = path.read_bytes()
        byte, bit = dice.randrange(len(data)), dice.randrange(8)
        flip(path, byte, bit)
        damages = check_cache(root).report.damages
        assert path.relative_to(root).as_posix() in {damage.file for damage in damages}, (path, byte, bit)
        path.write_bytes(data)
    assert check_cache(root).report.whole


def test_sixty_bit_flips(root: Path) -> None:
    flips(root, 60, seed=1)


@pytest.mark.slow
def test_thousand_bit_flips(root: Path) -> None:
    """Run by: pytest -m slow tests/cache/test_verify.py."""
    flips(root, int(os.environ.get("COGCACHE_FLIPS", "1000")), seed=2)


@pytest.mark.parametrize(
    ("series", "group", "what"),
    [
        (LATENTS, "17x32x48", "its facts say '9x32x48', and it is in a shard of 17x32x48"),
        (LATENTS, "9x32", "its facts say '9x32x48', and it is in a shard of 9x32"),
        (TEXT, "9", "it is in a shard of 9 tokens, not 8"),
        (TEXT, "9x8", "'9x8' is not a group of text"),
    ],
)
def test_entries_of_another_shape_than_their_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, series: str, group: str, what: str
) -> None:
    monkeypatch.setitem(verify_kit.GROUPS, series, group)
    verify_kit.encode(tmp_path / "cache")
    assert {damage.what for damage in check_cache(tmp_path / "cache").report.damages if damage.shard} == {
        what
    }


def test_a_row_of_another_bucket_than_its_latent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = verify_kit.sample
    monkeypatch.setattr(
        verify_kit, "sample", lambda clip: real(clip).model_copy(update={"frames": 17 if clip == 2 else 9})
    )
    verify_kit.encode(tmp_path / "cache")
    (damage,) = check_cache(tmp_path / "cache").report.damages
    assert (damage.file, damage.clips) == ("samples.jsonl", ("2.mp4",))
    assert damage.what == "it says 17x32x48 of 2.mp4, whose latent is in a shard of 9x32x48"
