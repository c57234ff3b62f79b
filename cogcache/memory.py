"""What is costly to find out about a file, remembered by its path, size and times.

The memory is a small SQLite file under ``$XDG_CACHE_HOME/cogcache`` (default ``~/.cache/cogcache``). It only
saves time: if it cannot be used, everything is found out again.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

__all__ = ["cache_folder", "remembered"]


def cache_folder() -> Path:
    """``$XDG_CACHE_HOME/cogcache``, by default ``~/.cache/cogcache``; may not exist yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cogcache"


def remembered(kind: str, path: Path, find_out: Callable[[Path], str]) -> str:
    """What ``find_out`` says of the file, from memory where the file has not changed since.

    Args:
        kind: What is asked; each kind is remembered by itself.

    Raises:
        OSError: if the file cannot be looked at; and whatever ``find_out`` raises, which is not remembered.
    """
    path = path.resolve()
    stat = path.stat()
    # A file changed within the clock's grain of its last look could keep its mtime; inode and ctime narrow that.
    stamp = f"{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ctime_ns}:{stat.st_ino}"
    known = _recall(kind, str(path), stamp)
    if known:
        return known
    value = find_out(path)
    with contextlib.suppress(OSError, sqlite3.Error), _memory() as memory:
        memory.execute("INSERT OR REPLACE INTO facts VALUES (?, ?, ?, ?)", (kind, str(path), stamp, value))
    return value


def _recall(kind: str, path: str, stamp: str) -> str:
    with contextlib.suppress(OSError, sqlite3.Error), _memory() as memory:
        query = "SELECT value FROM facts WHERE kind=? AND path=? AND stamp=?"
        row = memory.execute(query, (kind, path, stamp)).fetchone()
        return str(row[0]) if row else ""
    return ""


@contextlib.contextmanager
def _memory() -> Iterator[sqlite3.Connection]:
    base = cache_folder()
    base.mkdir(parents=True, exist_ok=True)
    connection = sqlite3.connect(base / "files.sqlite", timeout=10)
    try:
        connection.execute(
            "CREATE TABLE IF NOT EXISTS facts "
            "(kind TEXT, path TEXT, stamp TEXT, value TEXT, PRIMARY KEY (kind, path))"
        )
        with connection:
            yield connection
    finally:
        connection.close()
