"""Open files for reading by offset: few at a time, shared by threads, safe over fork and pickling."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np

__all__ = ["Handles"]


class _Descriptor:
    """A file descriptor, closed when its last user lets go of it."""

    def __init__(self, path: str | Path) -> None:
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        if hasattr(self, "number"):
            close(self.number)


class Handles:
    """The most recently used files stay open; reading moves no shared file position.

    Args:
        limit: Files kept open at once.
    """

    def __init__(self, limit: int = 64) -> None:
        self._limit = limit
        self._start()

    def _start(self) -> None:
        self._open: OrderedDict[str | Path, _Descriptor] = OrderedDict()
        self._lock = threading.Lock()
        self._process = os.getpid()

    def pread(self, path: str | Path, offset: int, size: int) -> memoryview:
        """Up to ``size`` bytes of the file at ``path`` from ``offset``, in new memory; fewer only at its end."""
        descriptor = self._get(path)
        data = np.empty(size, np.uint8).data  # unlike a bytearray not filled with zeros first
        done = 0
        while done < size:  # Linux reads at most 2 GiB at once
            count = os.preadv(descriptor.number, [data[done:]], offset + done)
            if not count:
                break
            done += count
        return data[:done]

    def _get(self, path: str | Path) -> _Descriptor:
        if self._process != os.getpid():  # a fork may have copied the lock while it was held
            self._start()
        with self._lock:
            descriptor = self._open.get(path) or _Descriptor(path)
            self._open[path] = descriptor
            self._open.move_to_end(path)
            if len(self._open) > self._limit:
                self._open.popitem(last=False)
            return descriptor

    def __getstate__(self) -> int:
        return self._limit

    def __setstate__(self, limit: int) -> None:
        self._limit = limit
        self._start()
