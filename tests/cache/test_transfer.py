"""Export and merge: entries come over byte for byte, and what does not fit is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from cache_kit import Crash, FakeOs, install, snapshot
from making_caches import write_cache

from cogcache.cache.format import FailureRecord, Identity
from cogcache.cache.reader import CacheReader
from cogcache.cache.transfer import choose, export_shards, merge_shards
from cogcache.cache.writer import CacheWriter
from cogcache.cli import run
from cogcache.errors import CacheError, DamagedCacheError, GeometryError, MismatchError
from cogcache.geometry import Size
from cogcache.tiny import Family

CLIPS = [(9, Size(32, 48)), (17, Size(48, 32)), (9, Size(32, 48)), (9, Size(32, 48))]


@pytest.fixture(scope="module")
def whole(tiny_models: Callable[[Family], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four image-to-video clips and two prompts for validation. Read only."""
    root = tmp_path_factory.mktemp("transfer") / "whole"
    return write_cache(root, tiny_models("5b-i2v"), CLIPS, dtype="bfloat16", prompts=2)


def entries(root: Path) -> dict[tuple[str, str], tuple[bytes, bytes]]:
    reader = CacheReader(root)
    return {
        (name, key): reader.contents(name, key)
        for name in reader.manifest.series
        for key in reader.keys(name)
    }


def ids(root: Path) -> list[str]:
    return [row.id for row in CacheReader(root).samples]


def export(root: Path, out: Path, *numbers: int) -> Path:
    listed = out.with_suffix(".txt")
    listed.write_text("".join(f"clip-{n:03d}\n" for n in numbers))
    export_shards(root, out, names=listed)
    return out


def test_a_part_is_a_cache_of_its_own(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "part"
    assert run(["export", str(whole), str(out), "--bucket", "9x32x48", "--limit", "2"]) == 0
    old, new = CacheReader(whole), CacheReader(out)
    assert [row.id for row in new.samples] == ["clip-000", "clip-002"]
    assert new.samples == [row for row in old.samples if row.id in ids(out)]
    assert new.validation == old.validation
    assert {n: s.fingerprint for n, s in new.manifest.series.items()} == {
        n: s.fingerprint for n, s in old.manifest.series.items()
    }
    known, copied = entries(whole), entries(out)
    assert copied.items() <= known.items()
    assert len(copied) == 2 + (1 + 2 + 2) + (2 * 3 + 2)
    assert not new.damages()


def test_all_of_it_is_the_same_cache(whole: Path, tmp_path: Path) -> None:
    export_shards(whole, tmp_path / "all")
    assert entries(tmp_path / "all") == entries(whole)
    first = snapshot(tmp_path / "all")
    export_shards(whole, tmp_path / "again")
    assert snapshot(tmp_path / "again") == first


def test_choosing(whole: Path, tmp_path: Path) -> None:
    samples = CacheReader(whole).samples
    rows = [row.model_copy(update={"caption": f"A Straße {row.id}"}) for row in samples]
    assert [row.id for row in choose(rows, query="STRASSE 002")] == ["clip-002"]
    assert [row.id for row in choose(rows, query="001.mp4 a")] == ["clip-001"]
    assert choose(rows, query="none such") == []
    assert [row.id for row in choose(rows, bucket="17X48x32")] == ["clip-001"]
    assert [row.id for row in choose(rows, names=["clip-003.mp4", "clip-000"])] == ["clip-000", "clip-003"]
    with pytest.raises(CacheError, match=r"'x.mp4' and 1 more is neither"):
        choose(rows, names=["x.mp4", "clip-000", "y"])
    with pytest.raises(GeometryError, match="is not a bucket"):
        choose(rows, bucket="9x32")
    with pytest.raises(CacheError, match="no sample"):
        export_shards(whole, tmp_path / "none", query="none such")
    assert not (tmp_path / "none").exists()


def test_parts_join_to_the_whole(whole: Path, tmp_path: Path) -> None:
    first, second = export(whole, tmp_path / "a", 0, 1, 2), export(whole, tmp_path / "b", 2, 3)
    out = tmp_path / "joined"
    assert run(["merge", str(out), str(first), str(second)]) == 0
    assert CacheReader(out).samples == CacheReader(whole).samples
    assert CacheReader(out).validation == CacheReader(whole).validation
    assert entries(out) == entries(whole)


def test_a_stopped_export_goes_on_to_the_same_bytes(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_shards(whole, tmp_path / "undisturbed")
    expected = snapshot(tmp_path / "undisturbed")
    counter = install(FakeOs(), monkeypatch)
    export_shards(whole, tmp_path / "counted")
    for number, stop_at in enumerate(range(0, counter.steps, 9)):
        out = tmp_path / f"stopped-{number}"
        with monkeypatch.context() as patch:
            install(FakeOs(stop_at, torn=True), patch)
            with pytest.raises(Crash):
                export_shards(whole, out)
        if not (out / "manifest.json").exists():
            export_shards(whole, out)
        assert len(CacheReader(out).samples) == len(CLIPS)
        assert {
            n: d for n, d in snapshot(out).items() if not n.endswith((".next", ".tmp", "samples.jsonl"))
        }.items() <= expected.items()


def test_other_settings_are_refused_field_by_field(
    whole: Path, tiny_models: Callable[[Family], Path], tmp_path: Path
) -> None:
    other = write_cache(tmp_path / "other", tiny_models("5b-i2v"), CLIPS, seed=1)
    with pytest.raises(MismatchError) as caught:
        merge_shards(tmp_path / "out", [whole, other])
    assert caught.value.differences == {f"series.{n}.seed": (0, 1) for n in ("images", "latents", "text")}
    t2v = write_cache(tmp_path / "t2v", tiny_models("5b"), CLIPS)
    with pytest.raises(MismatchError) as caught:
        merge_shards(tmp_path / "out", [whole, t2v])
    assert {"series", "model.in_channels"} <= caught.value.differences.keys()
    assert not (tmp_path / "out").exists()


def recommit(root: Path, caption: str = "", failed: str = "") -> None:
    """Change the caption of the first sample, or let a clip of that id fail."""
    reader = CacheReader(root)
    identity = {"format": "cogcache", **json.loads((root / "cache.json").read_bytes())}
    del identity["checksum"]
    rows = reader.samples
    if caption:
        rows = [rows[0].model_copy(update={"caption": caption}), *rows[1:]]
    lost = [FailureRecord(id=failed, source="f.mp4", window="start", reason="broken")] if failed else []
    writer = CacheWriter.open(root, Identity.model_validate(identity))
    writer.commit(rows, lost, reader.manifest.unconditional)


def test_one_id_with_two_meanings_is_refused(whole: Path, tmp_path: Path) -> None:
    other = shutil.copytree(whole, tmp_path / "other")
    recommit(other, caption="another")
    with pytest.raises(MismatchError, match=r"sample clip-000.*is another") as caught:
        merge_shards(tmp_path / "out", [whole, other])
    assert caught.value.differences == {"caption": ("clip 0", "another")}
    assert not (tmp_path / "out").exists()


def test_a_clip_that_is_there_has_not_failed(whole: Path, tmp_path: Path) -> None:
    first, second = export(whole, tmp_path / "a", 0), export(whole, tmp_path / "b", 1)
    recommit(first, failed="clip-001")
    recommit(second, failed="clip-009")
    merge_shards(tmp_path / "out", [first, second])
    assert [row.id for row in CacheReader(tmp_path / "out").failures] == ["clip-009"]


def test_nothing_finished_is_written_into_and_damage_does_not_travel(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="holds a finished cache"):
        export_shards(whole, whole)
    root = shutil.copytree(whole, tmp_path / "damaged")
    tar = next((root / "latents").glob("*.tar"))
    data = bytearray(tar.read_bytes())
    data[len(data) // 2] ^= 1
    tar.write_bytes(data)
    with pytest.raises(DamagedCacheError):
        export_shards(root, tmp_path / "out")
    assert not (tmp_path / "out" / "manifest.json").exists()
