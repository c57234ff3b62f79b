"""Hostile servers, and changed files of the local cache: what is read is right, or an error of ours."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

import fsspec
from hostile_cache import CacheBox, clear
from hostile_kit import Case, Target
from hostile_mutations import NUMBERS, mutate_bytes
from hostile_server import NOBODY

from cogcache.cache.reader import CacheReader
from cogcache.cache.remote import connection, lru
from cogcache.cache.remote.storage import RemoteOptions, RemoteStorage

__all__ = ["remote_targets"]

_LARGEST = 4 << 20
Everything = dict[tuple[str, str], tuple[bytes, bytes]]


def remote_targets(box: CacheBox, folder: Path, port: int) -> list[Target]:
    """Reading the cache of ``box``, which a hostile server serves at ``port``; ``folder`` is for the local cache."""
    folder.mkdir()
    local = folder / "lru"
    options = RemoteOptions(local, patience=0.0)
    honest = everything(f"http://127.0.0.1:{port}/honest", options)
    file_system = fsspec.filesystem("memory")
    for name, data in box.files.items():
        file_system.pipe_file(f"/honest/{name}", data)
    ports = (port, NOBODY)
    return [
        Target("server", _server(port, options, honest), (folder,), ports),
        Target("local_cache", _local_cache(local, honest), (folder,)),
    ]


def everything(url: str, options: RemoteOptions) -> Everything:
    """All entries of a cache, as bytes."""
    reader = CacheReader(url, options)
    assert not reader.damages()
    return {
        (series, key): reader.contents(series, key)
        for series in reader.manifest.series
        for key in reader.keys(series)
    }


def _server(port: int, options: RemoteOptions, honest: Everything) -> Case:
    def case(random: Random) -> None:
        clear_if_there(options.folder)
        url = f"http://127.0.0.1:{port}/c{random.randrange(1 << 40)}"
        with (
            mock.patch.object(connection, "LARGEST_FILE", _LARGEST),
            mock.patch.object(RemoteStorage, "parallel", 2),
            mock.patch.dict(os.environ, NETRC=os.devnull),
        ):
            reader = CacheReader(url, options)
            reader.damages()
            for series, key in random.sample(sorted(honest), 5):
                assert reader.contents(series, key) == honest[series, key]

    return case


def clear_if_there(folder: Path | None) -> None:
    """An empty folder, or none."""
    if folder and folder.exists():
        clear(folder)


def _local_cache(folder: Path, honest: Everything) -> Case:
    """The server is honest; the files kept of it are not."""

    def case(random: Random) -> None:
        limit = random.choice((0, 5000, 10**6, 10**9))
        options = RemoteOptions(folder, limit, patience=0.0)
        with (
            mock.patch.object(RemoteStorage, "parallel", 1),
            mock.patch.object(lru, "say"),
        ):
            if random.random() < 0.1 or not folder.exists():
                clear_if_there(folder)
                everything("memory://honest", RemoteOptions(folder))
            kept = sorted(path for path in folder.glob("??/*") if path.is_file() and not path.is_symlink())
            for path in random.sample(kept, min(len(kept), random.choice((1, 3, 10)))):
                random.choice(_CHANGES)(path, random.choice(kept), random)
            if random.random() < 0.3:
                _spoil_total(folder / "total", random)
            assert everything("memory://honest", options) == honest

    return case


def _spoil_total(path: Path, random: Random) -> None:
    numbers = [str(n) for n in NUMBERS if n != 10**400]
    data = random.choice((*numbers, "", "x", "9" * 5000, "\udc80", " 5 ", "\u0665"))
    path.write_bytes(data.encode("utf-8", "surrogateescape"))


def _other_bytes(path: Path, _: Path, random: Random) -> None:
    path.write_bytes(mutate_bytes(_small(path), random))


def _another_file(path: Path, other: Path, _: Random) -> None:
    path.write_bytes(_small(other))


def _small(path: Path) -> bytes:
    """The bytes of a file that no earlier case has made huge, or something else."""
    return path.read_bytes() if path.is_file() and path.stat().st_size < 1 << 20 else b"x"


def _huge(path: Path, *_: Any) -> None:
    with path.open("r+b") as stream:
        stream.truncate(1 << 36)


def _not_a_file(path: Path, _: Path, random: Random) -> None:
    path.unlink()
    kind = random.randrange(4)
    if kind == 0:
        path.mkdir()
    elif kind == 1:
        os.mkfifo(path)
    elif kind == 2:
        path.symlink_to(path)
    else:
        path.symlink_to(path.parent / "gone")


def _gone(path: Path, *_: Any) -> None:
    path.unlink()


_CHANGES: tuple[Callable[[Path, Path, Random], None], ...] = (
    *(_other_bytes, _other_bytes, _another_file, _huge, _not_a_file, _gone),
)
