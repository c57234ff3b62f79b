"""Every write of the cache passes through here: what is durable when, and how trouble is told.

Nothing else in :mod:`cogcache.cache` calls the operating system to change a file, so a test that replaces
``os`` in this module sees, counts, cuts or fails every single step.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cogcache.errors import StorageError

__all__ = [
    "AppendFile",
    "FileLock",
    "append_line",
    "make_folder",
    "remove",
    "remove_tree",
    "rename",
    "storage_errors",
    "sync_folder",
    "write_atomic",
    "write_file",
]

_BLOCK = 1 << 16
_AGAIN = "Then run the same command again: what is committed stays."
_TROUBLE = {
    errno.ENOSPC: ("the disk is full", f"Free some space. {_AGAIN}"),
    errno.EDQUOT: ("the disk quota is used up", f"Free some space. {_AGAIN}"),
    errno.EFBIG: ("the file would become larger than allowed", "Take smaller shards, or raise the limit."),
    errno.EACCES: ("no permission", "Change the permissions, or choose another folder."),
    errno.EPERM: ("no permission", "Change the permissions, or choose another folder."),
    errno.EROFS: ("the file system is read-only", "Choose a folder that can be written."),
    errno.EIO: ("the disk reports an input/output error", f"Check the disk. {_AGAIN}"),
    errno.ENOTDIR: ("part of the path is a file, not a folder", "Choose another folder."),
    errno.EEXIST: ("there is a file of that name, not a folder", "Choose another folder."),
    errno.EMFILE: ("too many open files", "Raise the limit (ulimit -n)."),
    errno.ENOLCK: ("the file system has no file locks", "Choose a folder on another file system."),
    errno.EOPNOTSUPP: ("the file system has no file locks", "Choose a folder on another file system."),
}


@contextmanager
def storage_errors(path: object, verb: str = "written") -> Iterator[None]:
    """Turn any :class:`OSError` inside into a :class:`StorageError`: ``path`` cannot be ``verb``, and why."""
    try:
        yield
    except OSError as error:
        reason, hint = _TROUBLE.get(error.errno or 0, (error.strerror or str(error), _AGAIN))
        raise StorageError(f"{path} cannot be {verb}: {reason}.", hint) from error


def make_folder(path: Path) -> None:
    """Create ``path`` and its parents where missing, durably; also one that a killed process has just made."""
    with storage_errors(path):
        missing = [p for p in (path, *path.parents) if not p.exists()]
    there = missing[-1].parent if missing else path
    sync_folder(there.parent, needed=False)
    for folder in reversed(missing):
        with storage_errors(path):
            os.makedirs(folder, exist_ok=True)  # noqa: PTH103  every change goes through this module's os
        sync_folder(folder.parent)


def sync_folder(path: Path, *, needed: bool = True) -> None:
    """Make the names in the folder ``path`` durable: files created, renamed and removed.

    Args:
        needed: Whether it matters if the folder may not be opened.
    """
    with storage_errors(path):
        try:
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except PermissionError:
            if needed:
                raise
            return
        try:
            os.fsync(fd)
        except OSError as error:
            if error.errno != errno.EINVAL:  # file systems that order names by themselves refuse it
                raise
        finally:
            os.close(fd)


def write_file(path: Path, data: bytes) -> None:
    """Write and fsync a whole file. A crash may leave it torn: for names that no reader trusts."""
    with storage_errors(path):
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        try:
            _write_all(fd, data)
            os.fsync(fd)
        finally:
            os.close(fd)


def write_atomic(path: Path, data: bytes) -> None:
    """Write ``path`` so that after a crash it holds the old content or the new, never a mixture.

    Durable on return. The temporary name is ``<name>.tmp``, so the caller must hold a lock.
    """
    draft = path.with_name(path.name + ".tmp")
    write_file(draft, data)
    rename(draft, path)


def rename(source: Path, target: Path) -> None:
    """Rename within one folder, replacing ``target``; durable on return."""
    with storage_errors(target):
        os.replace(source, target)  # noqa: PTH105
    sync_folder(target.parent)


def remove(*paths: Path) -> None:
    """Remove files, in this order, where they exist; durable on return."""
    gone: list[Path] = []
    for path in paths:
        with storage_errors(path), suppress(FileNotFoundError):
            os.unlink(path)  # noqa: PTH108
            gone.append(path.parent)
    for folder in dict.fromkeys(gone):
        sync_folder(folder)


def remove_tree(folder: Path) -> None:
    """Remove a folder with all that is in it. Gone from its name at one instant; a kill may leave its files as
    ``<name>.dropped``, which the next call clears away.
    """
    dropped = folder.with_name(f"{folder.name}.dropped")
    with storage_errors(folder):
        if dropped.exists():
            shutil.rmtree(dropped)
        if folder.exists():
            rename(folder, dropped)
            shutil.rmtree(dropped)
            sync_folder(folder.parent)


def append_line(path: Path, line: bytes) -> None:
    """Add one line to a file that several processes add to; durable on return.

    What a stopped process left of a line at the end is cut off.
    """
    with storage_errors(path):
        fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            size = os.fstat(fd).st_size
            whole = _whole_lines(fd, size)
            if whole != size:
                os.ftruncate(fd, whole)
            _write_all(fd, line)
            os.fsync(fd)
        finally:
            os.close(fd)
    if not size:
        sync_folder(path.parent)


def _whole_lines(fd: int, size: int) -> int:
    """Bytes up to the last newline in a file of ``size`` bytes."""
    end = size
    while end:
        start = max(0, end - _BLOCK)
        newline = os.pread(fd, end - start, start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end = start
    return 0


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


class AppendFile:
    """A file that only grows at its end, and is durable to its end after each :meth:`append`.

    Args:
        path: Created where missing; what it holds beyond ``keep`` bytes is cut off.
        keep: Bytes to keep.
    """

    def __init__(self, path: Path, keep: int) -> None:
        self.path = path
        self.end = keep
        with storage_errors(path):
            self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
            os.ftruncate(self._fd, keep)
            os.lseek(self._fd, keep, os.SEEK_SET)

    def append(self, data: bytes) -> None:
        """Add ``data`` and wait until it is on disk. After an error the file must be opened anew."""
        with storage_errors(self.path):
            _write_all(self._fd, data)
            getattr(os, "fdatasync", os.fsync)(self._fd)
        self.end += len(data)

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        if getattr(self, "_fd", -1) >= 0:
            close(self._fd)

    def close(self) -> None:
        """Close the file; twice does no harm."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class FileLock:
    """An exclusive ``flock`` on a file of its own. The system frees it when the holder dies.

    Each instance excludes every other one, in this process too.
    """

    def __init__(self, path: Path, fd: int) -> None:
        self.path = path
        self._fd = fd

    @classmethod
    def acquire(cls, path: Path, *, wait: bool) -> FileLock | None:
        """Take the lock on ``path``; without ``wait``, None if somebody else holds it."""
        with storage_errors(path):
            while True:
                fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
                    if _is_same(fd, path):
                        return cls(path, fd)
                except BlockingIOError:
                    os.close(fd)
                    return None
                except BaseException:
                    os.close(fd)
                    raise
                os.close(fd)  # its last holder removed the file while we waited

    def release(self) -> None:
        """Give the lock back; twice does no harm."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        if self._fd >= 0:
            close(self._fd)

    def __enter__(self) -> FileLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def _is_same(fd: int, path: Path) -> bool:
    try:
        there = os.stat(path)  # noqa: PTH116
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(fd), there)
