"""Planning, claiming, admission and commit."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from cache_kit import (
    BAD,
    CLIPS,
    LATENT_KEYS,
    TEXT_KEYS,
    data_file,
    data_files,
    encode,
    entry,
    fill,
    identity,
    latent_key,
    sample,
    snapshot,
    text_key,
)

from cogcache.cache.folder import SeriesFolder
from cogcache.cache.format import IMAGES, LATENTS, TEXT, Entry, FailureRecord, Identity
from cogcache.cache.reader import CacheReader
from cogcache.cache.shard import durable_keys
from cogcache.cache.writer import CacheWriter
from cogcache.errors import CacheError, DamagedCacheError, MismatchError

pytestmark = pytest.mark.usefixtures("fast_disk")

pytestmark = pytest.mark.usefixtures("backend")


@pytest.fixture
def writer(tmp_path: Path) -> CacheWriter:
    return CacheWriter.open(tmp_path / "cache", identity())


def shards(writer: CacheWriter, series: str) -> list[str]:
    return [
        path.relative_to(writer.root).as_posix()
        for path in data_files(writer.root)
        if path.is_relative_to(writer.root / series)
    ]


def test_every_changed_setting_is_listed(tmp_path: Path) -> None:
    CacheWriter.open(tmp_path, identity())
    other = identity(latents={"size": "64x64", "dtype": "float32", "fps": 8})
    variant = other.model.variant.model_copy(update={"scaling_factor": 1.0})
    other = other.model_copy(update={"model": other.model.model_copy(update={"variant": variant})})
    before = snapshot(tmp_path)
    with pytest.raises(MismatchError) as caught:
        CacheWriter.open(tmp_path, other)
    assert caught.value.differences == {
        "model.scaling_factor": (0.7, 1.0),
        "series.latents.fps": (None, 8),
        "series.latents.size": ("32x32", "64x64"),
    }
    assert "series.latents.size: was '32x32', is '64x64'" in str(caught.value)
    assert "--shards" in caught.value.hint
    assert snapshot(tmp_path) == before


def test_a_moved_model_and_a_new_series_are_admitted(tmp_path: Path) -> None:
    CacheWriter.open(tmp_path, identity())
    wanted = identity(images={"draws": 8})
    moved = wanted.model_copy(update={"model": wanted.model.model_copy(update={"id": "elsewhere"})})
    assert CacheWriter.open(tmp_path, moved).identity == moved
    back = CacheWriter.open(tmp_path, identity()).identity
    assert set(back.series) == {LATENTS, TEXT, IMAGES}
    assert back.model.id == "model"


def test_tuples_in_fingerprints_are_lists_on_disk(tmp_path: Path) -> None:
    tiled = identity(latents={"tiles": (240, 360)})
    CacheWriter.open(tmp_path, tiled)
    assert CacheWriter.open(tmp_path, tiled).identity.series[LATENTS] == {"tiles": [240, 360]}


def test_a_newer_version_is_refused(tmp_path: Path) -> None:
    CacheWriter.open(tmp_path, identity())
    from cogcache.cache.lines import dump_sealed, load_sealed

    path = tmp_path / "cache.json"
    path.write_bytes(dump_sealed({**load_sealed(path.read_bytes()), "version": 2}))
    with pytest.raises(CacheError, match="version 2") as caught:
        CacheWriter.open(tmp_path, identity())
    assert "Update" in caught.value.hint


def test_every_bit_of_the_identity_counts(tmp_path: Path) -> None:
    CacheWriter.open(tmp_path, identity())
    path = tmp_path / "cache.json"
    whole = path.read_bytes()
    for place in range(0, len(whole), 3):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        with pytest.raises(CacheError):
            CacheWriter.open(tmp_path, identity())


def test_a_folder_that_lost_its_identity_is_refused(tmp_path: Path) -> None:
    encode(tmp_path)
    (tmp_path / "cache.json").unlink()
    with pytest.raises(DamagedCacheError, match=r"no cache\.json"):
        CacheWriter.open(tmp_path, identity())


@pytest.mark.parametrize("name", ["../out", "a/b", "", "Latents", "a" * 40, "latents\n"])
def test_no_series_leaves_the_folder(name: str, tmp_path: Path) -> None:
    with pytest.raises(CacheError):
        CacheWriter.open(tmp_path / "cache", identity(**{name: {}}))
    assert [p.name for p in tmp_path.iterdir()] == ["cache"]


def test_keys_become_shards_in_their_order(writer: CacheWriter) -> None:
    writer.plan(LATENTS, [*LATENT_KEYS, LATENT_KEYS[0]], 2)
    writer.plan(LATENTS, LATENT_KEYS, 2)
    found = [(job.name, job.planned) for job in writer.jobs(LATENTS, LATENT_KEYS)]
    assert found == [
        ("latents-00000", tuple(LATENT_KEYS[:2])),
        ("latents-00001", tuple(LATENT_KEYS[2:4])),
        ("latents-00002", tuple(LATENT_KEYS[4:])),
    ]
    assert CLIPS == 5


@pytest.mark.parametrize("key", ["x" * 32, "0" * 31, "../" + "0" * 29, "0" * 32 + "\n", "A" * 32])
def test_only_keys_are_planned(key: str, writer: CacheWriter) -> None:
    with pytest.raises(ValueError, match="not an entry key"):
        writer.plan(LATENTS, [key], 2)
    with pytest.raises(ValueError, match="cannot hold 0"):
        writer.plan(LATENTS, LATENT_KEYS, 0)


def test_entries_come_in_the_order_of_the_plan(writer: CacheWriter) -> None:
    writer.plan(LATENTS, LATENT_KEYS, 3)
    for job in writer.jobs(LATENTS, LATENT_KEYS):
        job.append(entry(job.remaining[1]))
        for key in (job.remaining[0], job.remaining[1], latent_key(99)):
            with pytest.raises(ValueError, match="not the turn"):
                job.append(entry(key))
        with pytest.raises(ValueError, match="neither appended nor failed"):
            job.finish()
        break


def test_work_on_the_next_shard_may_begin_before(writer: CacheWriter) -> None:
    writer.plan(LATENTS, LATENT_KEYS, 3)
    jobs = list(writer.jobs(LATENTS, LATENT_KEYS))
    for job in reversed(jobs):
        for key in job.remaining:
            job.append(entry(key))
        job.finish()
    assert writer.committed(LATENTS) == set(LATENT_KEYS)
    with pytest.raises(ValueError, match="closed"):
        jobs[0].finish()


def test_others_skip_a_claimed_shard_until_it_is_given_up(writer: CacheWriter) -> None:
    other = CacheWriter.open(writer.root, identity())
    writer.plan(LATENTS, LATENT_KEYS, 3)
    jobs = writer.jobs(LATENTS, LATENT_KEYS)
    first = next(jobs)
    assert not writer.busy()
    assert other.busy()
    assert [job.name for job in other.jobs(LATENTS, LATENT_KEYS)] == ["latents-00001"]
    first.append(entry(first.remaining[0]))
    assert other.committed(LATENTS) == {LATENT_KEYS[0]}
    jobs.close()
    assert not other.busy()
    again = next(other.jobs(LATENTS, LATENT_KEYS))
    assert (again.name, again.remaining) == ("latents-00000", tuple(LATENT_KEYS[1:3]))


def test_an_exception_keeps_what_is_durable(writer: CacheWriter) -> None:
    writer.plan(LATENTS, LATENT_KEYS, 3)

    def work() -> None:
        for job in writer.jobs(LATENTS, LATENT_KEYS):
            with job:
                job.append(entry(job.remaining[0]))
                raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        work()
    assert writer.committed(LATENTS) == {LATENT_KEYS[0]}
    assert not CacheWriter.open(writer.root, identity()).busy()


def test_failed_keys_are_remembered_and_planned_again(writer: CacheWriter) -> None:
    writer.plan(LATENTS, LATENT_KEYS, 3)
    fill(writer, LATENTS, LATENT_KEYS)
    bad = latent_key(BAD)
    assert writer.failures() == {bad: "cannot be decoded"}
    writer.plan(LATENTS, LATENT_KEYS, 3)
    for job in writer.jobs(LATENTS, LATENT_KEYS):
        with job:
            assert job.planned == (bad,)
            job.append(entry(bad))
            job.finish()
    assert writer.failures() == {}
    assert writer.committed(LATENTS) == set(LATENT_KEYS)


def test_a_shard_without_entries_leaves_no_files(writer: CacheWriter) -> None:
    before = snapshot(writer.root)
    writer.plan(LATENTS, [latent_key(BAD)], 3)
    fill(writer, LATENTS, [latent_key(BAD)])
    assert snapshot(writer.root) == before


def test_a_failure_that_is_passed_over_is_planned_anew_in_the_next_run(writer: CacheWriter) -> None:
    writer.plan(LATENTS, LATENT_KEYS, 5)
    for job in writer.jobs(LATENTS, LATENT_KEYS):
        job.append(entry(LATENT_KEYS[0]))
        job.fail(LATENT_KEYS[1], "bad.mp4", "reason")
        job.append(entry(LATENT_KEYS[2]))
        break
    again = CacheWriter.open(writer.root, identity())
    again.plan(LATENTS, LATENT_KEYS, 5)
    assert [job.remaining for job in again.jobs(LATENTS, LATENT_KEYS)] == [
        tuple(LATENT_KEYS[3:]),
        (LATENT_KEYS[1],),
    ]


def test_planning_beside_a_process_that_goes_on_appending(
    writer: CacheWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer.plan(LATENTS, LATENT_KEYS, 5)
    job = next(jobs := writer.jobs(LATENTS, LATENT_KEYS))
    other = CacheWriter.open(writer.root, identity())
    todo = list(job.remaining)

    def durable(self: SeriesFolder, name: str) -> list[str]:
        found = durable_keys(self.path, name, self.data(name).relative_to(self.path).as_posix())
        job.append(entry(todo.pop(0)))
        return found

    monkeypatch.setattr(SeriesFolder, "durable", durable)
    other.plan(LATENTS, LATENT_KEYS, 5)
    assert [path.name for path in (writer.root / LATENTS).glob("*.plan.json")] == ["latents-00000.plan.json"]
    jobs.close()


def test_planned_keys_that_nobody_wants_any_more_are_left_out(writer: CacheWriter) -> None:
    writer.plan(LATENTS, LATENT_KEYS, 3)
    wanted = {LATENT_KEYS[0], LATENT_KEYS[2]}
    assert [job.remaining for job in writer.jobs(LATENTS, wanted)] == [(LATENT_KEYS[0], LATENT_KEYS[2])]
    fill(writer, LATENTS, wanted)
    assert writer.committed(LATENTS) == wanted
    assert shards(writer, LATENTS) == [
        data_file(writer.root, "latents-00000").relative_to(writer.root).as_posix()
    ]


def test_a_whole_shard_that_was_never_finished_is_offered_for_that(writer: CacheWriter) -> None:
    writer.plan(TEXT, TEXT_KEYS, 5)
    for job in writer.jobs(TEXT, TEXT_KEYS):
        for key in job.remaining:
            job.append(entry(key))
        break
    found = [job.remaining for job in writer.jobs(TEXT, TEXT_KEYS)]
    assert found == [()]


def test_reasons_of_any_form_are_journaled(writer: CacheWriter) -> None:
    writer.plan(LATENTS, LATENT_KEYS, 5)
    for job in writer.jobs(LATENTS, LATENT_KEYS):
        job.fail(LATENT_KEYS[0], "caf\udce9.mp4", "line\nbreak" + "x" * 100_000)
        break
    assert writer.failures()[LATENT_KEYS[0]].startswith("line\nbreakxxx")
    assert writer.journal.garbled == 0


def test_garbled_journal_lines_are_counted_and_cost_only_themselves(writer: CacheWriter) -> None:
    writer.journal.add("failed", series=LATENTS, key=LATENT_KEYS[0], source="a", reason="first")
    writer.journal.add("failed", series=LATENTS, key=LATENT_KEYS[1], source="b", reason="second")
    first, second = writer.journal.path.read_bytes().splitlines(keepends=True)
    for place in range(0, len(first) - 1, 5):
        changed = first[:place] + bytes([first[place] ^ 1]) + first[place + 1 :]
        writer.journal.path.write_bytes(changed + second)
        assert writer.failures() == {LATENT_KEYS[1]: "second"}
        assert writer.journal.garbled >= 1
    writer.journal.path.write_bytes(second + first[:40])
    assert writer.failures() == {LATENT_KEYS[1]: "second"}
    assert (writer.journal.garbled, writer.journal.torn) == (0, True)
    writer.journal.path.write_bytes(second + first[:-1] + b"\x0b")  # a changed bit
    assert writer.failures() == {LATENT_KEYS[1]: "second"}
    assert (writer.journal.garbled, writer.journal.torn) == (1, False)
    writer.journal.add("failed", series=LATENTS, key=LATENT_KEYS[2], source="c", reason="third")
    assert writer.failures() == {LATENT_KEYS[1]: "second", LATENT_KEYS[2]: "third"}
    assert (writer.journal.garbled, writer.journal.torn) == (0, False)


def ready(root: Path) -> CacheWriter:
    encode(root)
    return CacheWriter.open(root, identity())


def test_equal_content_gives_equal_bytes(tmp_path: Path) -> None:
    writer = ready(tmp_path)
    before = snapshot(tmp_path)
    samples = [sample(clip) for clip in range(CLIPS) if clip != BAD]
    failed = FailureRecord(id="bad", source="bad.mp4", window="start", reason="cannot be decoded")
    writer.commit(reversed(samples), [failed], TEXT_KEYS[0])
    assert snapshot(tmp_path) == before


def test_a_commit_needs_every_entry(tmp_path: Path) -> None:
    writer = ready(tmp_path)
    before = snapshot(tmp_path)
    good = sample(0)
    for row, empty in (
        (sample(BAD), TEXT_KEYS[0]),
        (good.model_copy(update={"text": text_key(9)}), TEXT_KEYS[0]),
        (good.model_copy(update={"images": (latent_key(0),)}), TEXT_KEYS[0]),
        (good, text_key(9)),
    ):
        with pytest.raises(CacheError, match="not complete"):
            writer.commit([row], [], empty)
    with pytest.raises(CacheError, match="two samples"):
        writer.commit([good, good], [], TEXT_KEYS[0])
    assert snapshot(tmp_path) == before


def test_a_commit_does_not_take_entries_of_unfinished_shards(writer: CacheWriter) -> None:
    writer.plan(TEXT, TEXT_KEYS, 5)
    for job in writer.jobs(TEXT, TEXT_KEYS):
        job.append(entry(TEXT_KEYS[0]))
        break
    assert writer.committed(TEXT) == {TEXT_KEYS[0]}
    with pytest.raises(CacheError, match="not complete"):
        writer.commit([], [], TEXT_KEYS[0])


def test_a_cache_grows_and_old_shards_stay(tmp_path: Path) -> None:
    writer = ready(tmp_path)
    before = snapshot(tmp_path)
    old = CacheReader(tmp_path)
    extra = latent_key(CLIPS)
    writer.plan(LATENTS, [*LATENT_KEYS, extra], 3)
    fill(writer, LATENTS, [*LATENT_KEYS, extra])
    assert CacheReader(tmp_path).manifest == old.manifest
    writer.commit([sample(0), sample(CLIPS)], [], TEXT_KEYS[0])
    assert [row.latents for row in CacheReader(tmp_path).samples] == [latent_key(0), extra]
    assert old.read(LATENTS, latent_key(2)).facts == entry(latent_key(2)).facts
    after = snapshot(tmp_path)
    assert {name for name in after if name.startswith("latents") and name not in before} == {
        data_file(tmp_path, "latents-00002").relative_to(tmp_path).as_posix(),
        "latents/latents-00002.index.jsonl",
    }
    shards = [
        name for name in before if name.startswith(("latents", "text")) and name != "latents/all/zarr.json"
    ]
    assert all(after[name] == before[name] for name in shards)


def test_a_deleted_shard_is_made_anew(tmp_path: Path) -> None:
    ready(tmp_path)
    data_file(tmp_path, "latents-00000").unlink()
    (tmp_path / LATENTS / "latents-00000.index.jsonl").unlink()
    with pytest.raises(DamagedCacheError, match="latents-00000"):
        CacheReader(tmp_path)
    encode(tmp_path)
    assert CacheReader(tmp_path).read(LATENTS, LATENT_KEYS[0]).facts == entry(LATENT_KEYS[0]).facts


@pytest.mark.parametrize("part", ["data", "index"])
def test_a_damaged_shard_is_never_built_upon(part: str, tmp_path: Path) -> None:
    writer = ready(tmp_path)
    index = tmp_path / LATENTS / "latents-00000.index.jsonl"
    path = index if part == "index" else data_file(tmp_path, "latents-00000")
    path.write_bytes(path.read_bytes()[:-1])
    again = CacheWriter.open(tmp_path, identity())
    with pytest.raises(DamagedCacheError, match="latents-00000") as caught:
        again.plan(LATENTS, LATENT_KEYS, 3)
    assert re.match(r"Run 'cogcache verify \S+ --repair'.* delete latents-00000\.\*", caught.value.hint)
    assert writer.root == tmp_path


def test_every_bit_of_an_index_counts_without_a_manifest(tmp_path: Path) -> None:
    ready(tmp_path)
    path = tmp_path / LATENTS / "latents-00000.index.jsonl"
    whole = path.read_bytes()
    for place in range(0, len(whole), 5):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        with pytest.raises(DamagedCacheError, match="index"):
            CacheWriter.open(tmp_path, identity()).committed(LATENTS)


def test_a_damaged_plan_is_refused(writer: CacheWriter) -> None:
    writer.plan(LATENTS, LATENT_KEYS, 3)
    path = writer.root / LATENTS / "latents-00000.plan.json"
    path.write_text(path.read_text().replace(LATENT_KEYS[0], LATENT_KEYS[1]))
    with pytest.raises(DamagedCacheError, match=r"plan\.json is damaged"):
        list(writer.jobs(LATENTS, LATENT_KEYS))


def test_the_same_entries_give_the_same_shards_anywhere(tmp_path: Path) -> None:
    encode(tmp_path / "one")
    (tmp_path / "deeper").mkdir()
    encode(tmp_path / "deeper" / "two")
    assert snapshot(tmp_path / "one") == snapshot(tmp_path / "deeper" / "two")


def test_what_is_not_json_never_reaches_a_shard(writer: CacheWriter) -> None:
    writer.plan(LATENTS, LATENT_KEYS, 3)
    for job in writer.jobs(LATENTS, LATENT_KEYS):
        with pytest.raises(ValueError, match="JSON"):
            job.append(Entry(LATENT_KEYS[0], entry(LATENT_KEYS[0]).tensors, {"fps": float("nan")}))
        break
    assert writer.committed(LATENTS) == set()


def test_identity_survives_its_own_file(tmp_path: Path) -> None:
    CacheWriter.open(tmp_path, identity())
    stored = json.loads((tmp_path / "cache.json").read_text())
    del stored["checksum"]
    assert Identity.model_validate(stored) == identity()
    shutil.rmtree(tmp_path / LATENTS)
