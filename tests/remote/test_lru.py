"""The local cache of what was fetched: bounded, shared, never in the way."""

from __future__ import annotations

import multiprocessing
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cogcache.cache.files import FileLock
from cogcache.cache.remote import lru
from cogcache.cache.remote.lru import Lru

LIMIT = 20_000


def used(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("??/*"))


def data_of(number: int) -> bytes:
    return bytes([number % 251]) * (500 + 37 * (number % 40))


def fill(folder: Path, first: int) -> int:
    """Put and get many from several threads; returns how often the folder was too large."""
    cache, over = Lru(folder, LIMIT), 0
    done = threading.Event()

    def work(number: int) -> None:
        cache.put(str(number), data_of(number))
        found = cache.get(str(number))
        assert found in (None, data_of(number))

    def watch() -> None:
        nonlocal over
        folder.mkdir(exist_ok=True)
        while not done.is_set():
            lock = FileLock.acquire(folder / "lock", wait=True)
            assert lock is not None
            with lock:
                over += used(folder) > LIMIT

    watcher = threading.Thread(target=watch)
    watcher.start()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(first, first + 200)))
    done.set()
    watcher.join()
    return over


def test_threads_and_processes_stay_within_the_limit(tmp_path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        assert pool.starmap(fill, [(tmp_path, 0), (tmp_path, 100)]) == [0, 0]
    assert LIMIT / 2 < used(tmp_path) <= LIMIT
    assert int((tmp_path / "total").read_text()) == used(tmp_path)


def test_what_was_used_longest_ago_goes_first(tmp_path: Path) -> None:
    cache = Lru(tmp_path, 1000)
    for number in range(9):
        cache.put(str(number), bytes(100))
        os.utime(cache._path(str(number)), ns=(number + 1, number + 1))
    assert cache.get("0") is not None
    cache.put("new", bytes(200))
    assert [str(n) for n in range(9) if cache.get(str(n)) is not None] == ["0", "3", "4", "5", "6", "7", "8"]
    assert cache.get("new") == bytes(200)


def test_a_lost_count_and_drafts_of_killed_processes_do_no_harm(tmp_path: Path) -> None:
    cache = Lru(tmp_path, 1000)
    for number in range(9):
        cache.put(str(number), bytes(100))
    draft = cache._path("0").with_suffix(".tmp")
    draft.write_bytes(bytes(600))
    (tmp_path / "total").write_text("torn")
    cache.put("new", bytes(100))
    assert not draft.exists()
    assert used(tmp_path) <= 1000


def test_nothing_is_kept_that_does_not_fit(tmp_path: Path) -> None:
    for limit in (0, 99):
        cache = Lru(tmp_path / str(limit), limit)
        cache.put("key", bytes(100))
        assert cache.get("key") is None
        assert not (tmp_path / str(limit)).exists()


def test_a_folder_that_cannot_be_written_costs_speed_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(lru, "say", said.append)
    (tmp_path / "file").write_text("")
    cache = Lru(tmp_path / "file" / "folder", 1000)
    for _ in range(2):
        cache.put("key", b"data")
        assert cache.get("key") is None
    assert len(said) == 1
    assert "going on without a local cache" in said[0]
