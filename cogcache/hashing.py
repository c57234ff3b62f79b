"""Content hashes of files, computed once and remembered by path, size and modification time.

The memory is a small SQLite file under ``$XDG_CACHE_HOME/cogcache`` (default ``~/.cache/cogcache``). It only
saves time: if it cannot be used, hashes are computed again.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from cogcache.errors import ModelError

__all__ = ["content_id", "file_sha256", "weights_sha256"]


def file_sha256(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    path = path.resolve()
    stat = path.stat()
    # A file changed within the clock's grain of its last hash could keep its mtime; inode and ctime narrow that.
    stamp = f"{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ctime_ns}:{stat.st_ino}"
    known = _recall(str(path), stamp)
    if known:
        return known
    with path.open("rb") as stream:
        digest = _sha256(stream)
    _remember(str(path), stamp, digest)
    return digest


def content_id(path: Path) -> str:
    """Hex sha256 of a file's bytes, or where it cannot be read a text that says so and belongs to it alone."""
    try:
        return file_sha256(path)
    except OSError as error:
        return f"unreadable {path}: {error.strerror or error}"


def weights_sha256(folder: Path) -> str:
    """Hex sha256 over the names and contents of a component's safetensors files.

    Raises:
        ModelError: if there are none.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelError(
            f"{folder} has no .safetensors weights.", "Pickled weights (.bin, .pt) are never loaded."
        )
    total = hashlib.sha256()
    for file in files:
        total.update(f"{file.name}\0{file_sha256(file)}\n".encode())
    return total.hexdigest()


def _sha256(stream: BinaryIO) -> str:
    digest = hashlib.sha256()
    while chunk := stream.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()


@contextlib.contextmanager
def _memory() -> Iterator[sqlite3.Connection]:
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cogcache"
    base.mkdir(parents=True, exist_ok=True)
    connection = sqlite3.connect(base / "hashes.sqlite", timeout=10)
    try:
        connection.execute(
            "CREATE TABLE IF NOT EXISTS hashes (path TEXT PRIMARY KEY, stamp TEXT, sha256 TEXT)"
        )
        with connection:
            yield connection
    finally:
        connection.close()


def _recall(path: str, stamp: str) -> str:
    with contextlib.suppress(OSError, sqlite3.Error), _memory() as memory:
        row = memory.execute("SELECT sha256 FROM hashes WHERE path=? AND stamp=?", (path, stamp)).fetchone()
        return str(row[0]) if row else ""
    return ""


def _remember(path: str, stamp: str, digest: str) -> None:
    with contextlib.suppress(OSError, sqlite3.Error), _memory() as memory:
        memory.execute("INSERT OR REPLACE INTO hashes VALUES (?, ?, ?)", (path, stamp, digest))
