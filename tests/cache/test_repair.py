"""Repair keeps what is good, drops what is not, and the next encode makes just that."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

import pytest
from cache_kit import Crash, FakeOs, data_file, install, snapshot
from verify_kit import CLIPS, encode, facts_by_key, flip, flip_tensor, identity, latent_key, text_key

from cogcache.cache.check import check_cache
from cogcache.cache.damage import Repaired
from cogcache.cache.files import remove
from cogcache.cache.format import LATENTS, TEXT
from cogcache.cache.reader import CacheReader
from cogcache.cache.repair import repair_cache
from cogcache.cache.writer import CacheWriter
from cogcache.errors import CacheError


def repair(root: Path, model_id: str | None = None) -> Repaired:
    return repair_cache(check_cache(root), model_id)


def entries(root: Path) -> dict[str, tuple[str, object]]:
    """Every entry as it reads, by key."""
    reader = CacheReader(root)
    read = [reader.read(series, key) for series in (LATENTS, TEXT) for key in reader.keys(series)]
    assert len({entry.key for entry in read}) == len(read)
    return {
        entry.key: (str([t.flatten().tolist() for t in entry.tensors.values()]), entry.facts)
        for entry in read
    }


def test_whole_cache_is_left_alone(root: Path, finished: Path) -> None:
    result = repair(root)
    assert not result.done
    assert not result.missing
    assert snapshot(root) == snapshot(finished)


def test_damaged_entry_is_dropped_and_made_again(root: Path, finished: Path) -> None:
    flip_tensor(root, LATENTS, latent_key(3))
    result = repair(root)
    assert result.missing
    assert check_cache(root).report.whole
    reader = CacheReader(root)  # can be trained from at once, without that clip
    assert len(reader.samples) == CLIPS - 1
    assert {row.source: "dropped" in row.reason for row in reader.failures} == {
        "3.mp4": True,
        "lost.mp4": False,
    }
    before, kept = snapshot(finished), snapshot(root)
    dropped = ("latents-9x32x48-00001.", str(data_file(root, "latents-9x32x48-00001").relative_to(root)))
    rest = [
        name
        for name in before
        if "/" in name and not any(d in name for d in dropped) and "zarr.json" not in name
    ]
    assert len(rest) == 8
    assert all(kept[name] == before[name] for name in rest)
    assert encode(root) == [latent_key(3)]
    assert check_cache(root).report.whole
    assert entries(root) == entries(finished)
    after = snapshot(root)
    assert all(
        after[name] == before[name] for name in [*rest, "samples.jsonl", "failures.jsonl", "cache.json"]
    )


@pytest.mark.parametrize(
    "backend", ["webdataset"], indirect=True
)  # others have no headers between their members
def test_changed_header_loses_nothing(root: Path, finished: Path) -> None:
    shard = data_file(root, "latents-9x32x48-00001")
    flip(shard, shard.read_bytes().index(latent_key(3).encode()) + 150)  # in the checksum of a tar header
    (damage,) = check_cache(root).report.damages
    assert "header" in damage.what
    assert damage.key == latent_key(3)
    repair(root)
    assert check_cache(root).report.whole
    assert encode(root) == []
    assert entries(root) == entries(finished)


def test_lost_shard_is_made_again(root: Path, finished: Path) -> None:
    for path in (
        data_file(root, "latents-9x32x48-00001"),
        root / "latents" / "latents-9x32x48-00001.index.jsonl",
    ):
        path.unlink()
    assert repair(root).missing
    assert check_cache(root).report.whole
    assert encode(root) == [latent_key(2), latent_key(3)]
    assert entries(root) == entries(finished)


@pytest.mark.parametrize(
    "lost", ["manifest.json", "cache.json", "an index", "manifest and indexes", "all but the tables"]
)
def test_what_is_lost_is_rebuilt_bit_for_bit(root: Path, finished: Path, lost: str) -> None:
    for name in ("manifest.json", "cache.json"):
        if lost in (name, "all but the tables") or lost.startswith(name.split(".")[0]):
            (root / name).unlink()
    indexes = sorted(root.rglob("*.index.jsonl"))
    for path in {"an index": indexes[:1], "manifest.json": [], "cache.json": []}.get(lost, indexes):
        path.unlink()
    assert not check_cache(root).report.whole
    result = repair(root, "some/model")
    assert not result.missing, result.done
    assert snapshot(root) == snapshot(finished)
    assert check_cache(root).report.whole
    assert encode(root) == []


def test_changed_index_manifest_and_identity_are_rebuilt(root: Path, finished: Path) -> None:
    for name in ("manifest.json", "cache.json", "latents/latents-9x32x48-00000.index.jsonl"):
        flip(root / name, 200)
        assert not check_cache(root).report.whole
        repair(root, "some/model")
        assert snapshot(root) == snapshot(finished)


def test_lost_samples_come_from_the_lists(root: Path, finished: Path) -> None:
    (root / "samples.jsonl").unlink()
    result = repair(root)
    assert result.missing
    assert "lists" in result.done[-1]
    assert encode(root) == []  # nothing is encoded
    assert snapshot(root) == snapshot(finished)


def test_changed_row_is_not_believed_without_a_manifest(root: Path, finished: Path) -> None:
    (root / "manifest.json").unlink()
    rows = (root / "samples.jsonl").read_bytes()
    (root / "samples.jsonl").write_bytes(rows.replace(b"caption 1", b"caption 7", 1))
    assert repair(root).missing
    assert not (root / "manifest.json").exists()
    assert encode(root) == []
    assert snapshot(root) == snapshot(finished)


def test_data_file_without_index_and_manifest_is_walked_with_care(root: Path) -> None:
    (root / "manifest.json").unlink()
    (root / "latents" / "latents-9x32x48-00001.index.jsonl").unlink()
    shard = data_file(root, "latents-9x32x48-00001")
    flip(shard, shard.read_bytes().index(b"sha of 3") + 1)  # facts prove their key
    assert repair(root).missing
    assert check_cache(root).report.whole
    assert encode(root) == [latent_key(3)]


def test_what_was_made_again_is_not_taken_twice(root: Path, finished: Path) -> None:
    (root / "latents" / "latents-9x32x48-00001.index.jsonl").unlink()
    (root / "manifest.json").unlink()
    assert encode(root) == [latent_key(2), latent_key(3)]
    report = check_cache(root).report
    assert report.whole
    file = data_file(root, "latents-9x32x48-00001").relative_to(root)
    assert report.facts == [f"{file} has no index, so it is no part of the cache; it can be deleted"]
    (root / "manifest.json").unlink()
    repair(root)
    assert check_cache(root).report.whole
    assert not check_cache(root).report.facts
    assert encode(root) == []
    assert entries(root) == entries(finished)


def test_journal_is_cleaned(root: Path) -> None:
    flip(root / "journal.jsonl", 40)
    lines = (root / "journal.jsonl").read_bytes().count(b"\n")
    result = repair(root)
    assert not result.missing
    assert check_cache(root).report.whole
    assert (root / "journal.jsonl").read_bytes().count(b"\n") == lines - 1


def test_lost_caption_of_nothing(root: Path, finished: Path) -> None:
    """Without the empty caption's entry there can be no manifest; encode mends it."""
    flip_tensor(root, TEXT, text_key(""))
    assert repair(root).missing
    assert encode(root) == [text_key("")]
    assert check_cache(root).report.whole
    assert entries(root) == entries(finished)


def test_busy_cache_is_refused(root: Path) -> None:
    (root / "manifest.json").unlink()
    writer = CacheWriter.open(root, identity())
    writer.plan(TEXT, ["ab" * 16], 1)
    jobs = writer.jobs(TEXT, ["ab" * 16])
    job = next(jobs)
    with pytest.raises(CacheError, match="another process"):
        repair(root)
    job.close()


def test_stopped_anywhere(
    root: Path, finished: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A repair that is cut at every step: the next one, or the next encode, ends with every entry, none twice."""
    flip_tensor(root, LATENTS, latent_key(3))
    (root / "text" / "text-8-00000.index.jsonl").unlink()
    wanted, step, ended = entries(finished), 0, False
    while not ended:
        cut = Path(shutil.copytree(root, tmp_path / "cut" / str(step)))
        install(FakeOs(stop_at=step), monkeypatch)
        try:
            repair(cut)
            ended = True
        except Crash:
            pass
        install(FakeOs(), monkeypatch)
        if step % 2:
            repair(cut)
            assert check_cache(cut).report.whole
            assert set(encode(cut)) <= {latent_key(3)}, step
        else:
            with contextlib.suppress(CacheError):
                encode(cut)  # whatever it makes again ...
            repair(cut)  # ... is not taken twice
            encode(cut)
        assert check_cache(cut).report.whole
        assert entries(cut) == wanted
        assert CacheReader(cut).keys(TEXT)
        step += 3  # odd, so that both ways of going on meet steps of all kinds
    assert step > 20
    assert len(facts_by_key()[LATENTS]) == CLIPS


def test_stopped_while_it_tidies_up(root: Path, finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The new shard has the number of the last one, whose list of good entries is still there."""
    flip_tensor(root, LATENTS, latent_key(5))

    def half(*paths: Path) -> None:
        remove(*paths)
        if paths[-1].name.endswith(".damaged"):
            raise Crash

    with monkeypatch.context() as patch:
        patch.setattr("cogcache.cache.repair.remove", half)
        with pytest.raises(Crash):
            repair(root)
    assert (root / "latents" / "latents-9x32x48-00002.index.damaged").exists()
    repair(root)
    assert check_cache(root).report.whole
    assert encode(root) == [latent_key(5)]
    assert entries(root) == entries(finished)
