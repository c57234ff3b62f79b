"""Kill, cut and fail the writer everywhere: what was durable stays, what is finished is byte for byte the same."""

from __future__ import annotations

import errno
import gc
import os
import random
import resource
import shutil
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest
from cache_kit import (
    CLIPS_PER_SHARD,
    LATENT_KEYS,
    TEXT_KEYS,
    Crash,
    FakeOs,
    PowerOs,
    begin,
    data_file,
    encode,
    encode_until_idle,
    entry,
    identity,
    install,
    snapshot,
)
from process_kit import Run, drain, join, kill_at_random

from cogcache.cache import files
from cogcache.cache.format import LATENTS, TEXT
from cogcache.cache.reader import CacheReader
from cogcache.cache.writer import CacheWriter
from cogcache.errors import CogcacheError, StorageError

KILLS = 24


@pytest.fixture(autouse=True, scope="module")
def _quick_collection() -> Iterator[None]:
    """Keep torch's objects out of every ``gc.collect()``, which takes the place of a dead process's locks."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def durable(root: Path) -> set[str]:
    writer = CacheWriter.open(root, identity(root))
    return writer.committed(LATENTS) | writer.committed(TEXT)


@pytest.mark.usefixtures("fast_disk")
def test_killed_at_random(
    processes: ForkServerContext, tmp_path: Path, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    steps, dice = all_steps(monkeypatch, begin(tmp_path / "whole")), random.Random(0)
    kills, caches = 0, 0
    while kills < KILLS or caches < 2:
        root, killed, told = begin(tmp_path / str(caches)), True, set[str]()
        while killed:
            run = Run(processes, encode, root)
            kill_at_random([run], [run], steps, dice)
            told |= join([run])
            killed = run.killed
            kills += killed
            assert told <= durable(root)
        assert snapshot(root) == expected
        caches += 1


def test_several_processes_fill_one_cache(
    processes: ForkServerContext, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    root = begin(tmp_path / "cache")
    workers = [Run(processes, encode_until_idle, root) for _ in range(3)]
    join(workers)
    assert not any(worker.killed for worker in workers)
    assert snapshot(root) == expected


def all_steps(monkeypatch: pytest.MonkeyPatch, root: Path) -> int:
    with monkeypatch.context() as patch:
        fake = install(FakeOs(), patch)
        encode(root)
    assert {"write", "replace", "unlink", "ftruncate", "fdatasync"} <= set(fake.log)
    return fake.steps


@pytest.mark.parametrize("torn", [False, True])
def test_stopped_before_every_single_step(
    torn: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    for step in range(all_steps(monkeypatch, tmp_path / "whole")):
        root, told = tmp_path / str(step), list[str]()
        with monkeypatch.context() as patch:
            fake = install(FakeOs(stop_at=step, torn=torn), patch)
            with pytest.raises(Crash):
                encode(root, told.append)
            gc.collect()
            install(FakeOs(), patch)
            there, again = durable(root), list[str]()
            assert set(told) <= there, fake.log
            encode(root, again.append)
            assert there.isdisjoint(again), fake.log
        assert snapshot(root) == expected, fake.log


@pytest.mark.parametrize(("error", "torn"), [(errno.ENOSPC, True), (errno.EIO, False)])
def test_every_single_step_fails(
    error: int, torn: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    for step in range(all_steps(monkeypatch, tmp_path / "whole")):
        root, told = tmp_path / str(step), list[str]()
        with monkeypatch.context() as patch:
            fake = install(FakeOs(stop_at=step, error=error, torn=torn), patch)
            with pytest.raises(StorageError, match=r"cannot be (written|read): .+\. .+") as caught:
                encode(root, told.append)
            assert caught.value.hint
            caught = None
            gc.collect()
            install(FakeOs(), patch)
            there, again = durable(root), list[str]()
            assert set(told) <= there, fake.log
            encode(root, again.append)
            assert there.isdisjoint(again), fake.log
        assert snapshot(root) == expected, fake.log


def test_a_kill_while_a_finished_cache_grows_keeps_it_readable(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, undisturbed: Path
) -> None:
    before = CacheReader(undisturbed).manifest
    for step in range(1000):
        root = tmp_path / str(step)
        shutil.copytree(undisturbed, root)
        with monkeypatch.context() as patch:
            install(FakeOs(stop_at=step), patch)
            writer, through = None, False
            try:
                writer = CacheWriter.open(root, identity(root))
                writer.commit([], [], TEXT_KEYS[0])
                through = True
            except Crash:
                pass
            del writer
            gc.collect()
        reader = CacheReader(root)
        assert reader.manifest == before or reader.samples == []
        if through:
            assert step > 10
            break
        with monkeypatch.context() as patch:
            install(FakeOs(), patch)
            encode(root)
        assert snapshot(root) == snapshot(undisturbed)


def test_a_power_cut_takes_nothing_that_counts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    with monkeypatch.context() as patch:
        power = PowerOs()
        patch.setattr(files, "os", power)
        told = []

        def done(key: str) -> None:
            told.append(key)
            assert not power.dirty

        encode(tmp_path / "deep" / "cache", done)
        assert not power.dirty
    assert len(told) == len(set(told)) == len(LATENT_KEYS) - 1 + len(TEXT_KEYS)
    data = data_file(tmp_path / "deep" / "cache", "latents-00000").name
    assert {data, "latents-00000.index.jsonl", "manifest.json"} <= set(power.log)
    assert snapshot(tmp_path / "deep" / "cache") == expected


def part_written(root: Path) -> None:
    """A cache with one unfinished shard of three entries, two of them durable."""
    writer = CacheWriter.open(root, identity(root))
    writer.plan(LATENTS, LATENT_KEYS, CLIPS_PER_SHARD)
    for job in writer.jobs(LATENTS, LATENT_KEYS):
        job.append(entry(LATENT_KEYS[0]))
        job.append(entry(LATENT_KEYS[2]))
        break


def cut(data: bytes, place: int) -> bytes:
    return data[:place]


def flip(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 1 << place % 8]) + data[place + 1 :]


def glue(data: bytes, place: int) -> bytes:
    return data + data[:place]


@pytest.mark.parametrize("damage", [cut, flip, glue])
@pytest.mark.parametrize(("part", "stride"), [("data", 61), ("index", 7)])
@pytest.mark.usefixtures("fast_disk")
def test_torn_part_files(
    damage: Callable[[bytes, int], bytes],
    part: str,
    stride: int,
    tmp_path: Path,
    expected: dict[str, bytes],
) -> None:
    start = tmp_path / "start"
    part_written(start)
    data = data_file(start, "latents-00000").relative_to(start)
    name = "latents/latents-00000.index.part" if part == "index" else f"{data}.part"
    whole = (start / name).read_bytes()
    blocks = {block + near for block in range(512, len(whole), 512) for near in (-1, 0)}
    for place in sorted({*range(0, len(whole), stride), *blocks, len(whole) - 1}):
        root = tmp_path / str(place)
        shutil.copytree(start, root)
        (root / name).write_bytes(damage(whole, place))
        encode(root)
        assert snapshot(root) == expected, place


def _over_the_limit(root: Path, pipe: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, resource.RLIM_INFINITY))
    pipe.send(_error_of(lambda: encode(root)))


def _without_permission(root: Path, pipe: Connection) -> None:
    if os.geteuid() == 0:
        os.seteuid(65534)
    pipe.send(_error_of(lambda: CacheWriter.open(root, identity())))


def _error_of(action: Callable[[], object]) -> str:
    try:
        action()
    except CogcacheError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


@pytest.mark.parametrize(
    ("body", "message"),
    [(_over_the_limit, "larger than allowed"), (_without_permission, "no permission")],
)
def test_real_refusals_of_the_system(
    body: Callable[[Path, Connection], None],
    message: str,
    processes: ForkServerContext,
    tmp_path: Path,
    expected: dict[str, bytes],
) -> None:
    root = tmp_path / "cache"
    if body is _over_the_limit:
        begin(root)
    else:
        tmp_path.chmod(0o555)
    receive, send = processes.Pipe(duplex=False)
    process = processes.Process(target=body, args=(root, send))
    process.start()
    send.close()
    said = drain(receive)
    process.join()
    tmp_path.chmod(0o755)
    assert said
    assert said[0].startswith("StorageError: ")
    assert message in said[0]
    encode(root)
    assert snapshot(root) == expected


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for root in (tmp_path / "file", tmp_path / "file" / "cache"):
        with pytest.raises(StorageError, match="a file"):
            CacheWriter.open(root, identity(root))
