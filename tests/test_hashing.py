"""Content hashes, remembered only as long as the file is the same."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from cogcache import hashing
from cogcache.errors import ModelError
from cogcache.hashing import content_id, file_sha256, weights_sha256


@pytest.fixture(autouse=True)
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "cogcache" / "files.sqlite"


def test_hash_is_of_the_content_and_remembered(
    tmp_path: Path, memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"x" * 3_000_000)
    expected = hashlib.sha256(b"x" * 3_000_000).hexdigest()
    assert file_sha256(file) == expected
    assert memory.is_file()
    monkeypatch.setattr(hashing, "_sha256", lambda _: "read again")
    assert file_sha256(file) == expected
    link = tmp_path / "link"
    link.symlink_to(file)
    assert file_sha256(link) == expected
    moved = file.rename(tmp_path / "moved")
    assert file_sha256(moved) == "read again"


def test_changed_file_is_hashed_again(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"one")
    stat = file.stat()
    first = file_sha256(file)
    file.write_bytes(b"two")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # same size and time, as rsync -t leaves them
    assert file_sha256(file) == hashlib.sha256(b"two").hexdigest() != first


@pytest.mark.parametrize("content", [b"", b"not a database", b"SQLite format 3\0" + b"\xff" * 500])
def test_damaged_memory_only_costs_time(tmp_path: Path, memory: Path, content: bytes) -> None:
    memory.parent.mkdir(parents=True)
    memory.write_bytes(content)
    (tmp_path / "file").write_bytes(b"one")
    for _ in range(2):
        assert file_sha256(tmp_path / "file") == hashlib.sha256(b"one").hexdigest()


def test_memory_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "home").write_text("a file where the folder should be")
    (tmp_path / "file").write_bytes(b"one")
    assert file_sha256(tmp_path / "file") == hashlib.sha256(b"one").hexdigest()


def test_unreadable_files_have_ids_of_their_own(tmp_path: Path) -> None:
    one, two = content_id(tmp_path / "one"), content_id(tmp_path / "two")
    assert one != two
    assert one.startswith("unreadable")
    assert "No such file" in one


def test_weights_hash_covers_names_and_contents(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no \.safetensors weights"):
        weights_sha256(tmp_path)
    (tmp_path / "a.safetensors").write_bytes(b"1")
    (tmp_path / "b.safetensors").write_bytes(b"2")
    first = weights_sha256(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert weights_sha256(tmp_path) == first
    (tmp_path / "a.safetensors").write_bytes(b"2")
    (tmp_path / "b.safetensors").write_bytes(b"1")
    swapped = weights_sha256(tmp_path)
    (tmp_path / "b.safetensors").rename(tmp_path / "c.safetensors")
    assert len({first, swapped, weights_sha256(tmp_path)}) == 3
