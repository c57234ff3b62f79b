"""Reading what must be a regular file: anything else under its name could be waited for, or never end."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

__all__ = ["LARGEST_FILE", "open_regular", "read_regular"]

LARGEST_FILE = 1 << 32
"""Bytes of a manifest, table or index at most, where no other number bounds how much memory one may take."""


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading; links are followed.

    Raises:
        FileNotFoundError: if there is none.
        OSError: if it cannot be read, or is a folder, a pipe or a device.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # without waiting for a pipe's other end
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "it is no regular file")
    return os.fdopen(fd, "rb")


def read_regular(path: Path) -> bytes:
    """All bytes of a regular file; raises as :func:`open_regular`."""
    with open_regular(path) as stream:
        return stream.read()
