"""``journal.jsonl``: what happened to a cache, line by line, with reasons.

Nothing but the reasons of failures is read back, so a lost journal loses no data.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cogcache.cache.files import append_line
from cogcache.cache.lines import seal_line, unseal_line
from cogcache.cache.regular import open_regular

__all__ = ["MAX_REASON", "Journal"]

MAX_REASON = 4000
_MAX_LINE = 1 << 20


class Journal:
    """Append-only; safe for any number of threads and processes.

    Attributes:
        garbled: Lines that the last :meth:`read` found changed, and left out.
        torn: Whether it found the beginning of a line at the end: its writer was stopped. The next one cuts it off.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.garbled, self.torn = 0, False

    def add(self, event: str, **fields: Any) -> None:
        """Append an event; durable on return.

        Raises:
            StorageError: if it cannot be written.
        """
        known = {name: _text(value) if isinstance(value, str) else value for name, value in fields.items()}
        append_line(self.path, seal_line({"event": event, "time": round(time.time(), 3), **known}))

    def read(self) -> Iterator[dict[str, Any]]:
        """All whole events, oldest first."""
        self.garbled, self.torn = 0, False
        if not self.path.is_file():
            return
        with open_regular(self.path) as stream:
            while line := stream.readline(_MAX_LINE):
                event = unseal_line(line)
                if event is not None:
                    yield event
                elif _is_torn(line):
                    self.torn = True
                elif line.strip():
                    self.garbled += 1

    def reasons(self) -> dict[tuple[str, str], str]:
        """(series, key) -> the reason recorded last, for every entry that ever failed."""
        return {
            (str(e.get("series")), str(e.get("key"))): str(e.get("reason"))
            for e in self.read()
            if e.get("event") == "failed"
        }


def _is_torn(line: bytes) -> bool:
    """Whether it is the beginning of a line; a whole one whose newline has changed is not."""
    ends = line.endswith(b"\n") or len(line) == _MAX_LINE
    return not ends and unseal_line(line[:-1] + b"\n") is None


def _text(value: str) -> str:
    """``value`` as UTF-8 can hold it: file names may not be."""
    return value.encode("utf-8", "backslashreplace").decode()
