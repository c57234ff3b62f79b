"""A file system that is really full, again and again, and grows: where the tests may mount one."""

from __future__ import annotations

import gc
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from cache_kit import snapshot
from kill_kit import Kept, Lists, check_after_kill, encoding

from cogcache.errors import StorageError

LISTS = Lists(6, per_shard=2, bad=frozenset({1}), draws=1, prompts=1)
PAGE_KIB = 4


def mount(folder: Path, *options: str) -> bool:
    done = subprocess.run(
        ["mount", "-t", "tmpfs", *options, "tmpfs", str(folder)], capture_output=True, check=False
    )
    return done.returncode == 0


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of a few pages."""
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        mounted = mount(folder, "-o", f"size={2 * PAGE_KIB}k")
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("mounting a tmpfs is not allowed here")
    yield folder
    gc.collect()
    subprocess.run(["umount", str(folder)], check=True)


def test_full_file_system_that_grows(disk: Path, tmp_path: Path) -> None:
    encode = encoding(LISTS)
    encode(tmp_path / "whole", str)
    root, kept, full, size, through = disk / "cache", Kept({}, frozenset()), 0, 2 * PAGE_KIB, False
    while not through:
        told: list[str] = []
        try:
            encode(root, told.append)
            through = True
        except StorageError as error:
            full += "the disk is full" in error.message
        gc.collect()
        assert kept.keys.isdisjoint(told)
        if root.exists():
            kept = check_after_kill(root, kept, frozenset(told), finished=through)
        size += 4 * PAGE_KIB
        assert mount(disk, "-o", f"remount,size={size}k")
    assert full > 5
    assert snapshot(root) == snapshot(tmp_path / "whole")
