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

__all__ = ["MAX_REASON", "Journal"]

MAX_REASON = 4000
_MAX_LINE = 1 << 20


class Journal:
    """Append-only; safe for any number of threads and processes.

    Attributes:
        garbled: Lines that the last :meth:`read` found torn or changed, and left out.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.garbled = 0

    def add(self, event: str, **fields: Any) -> None:
        """Append an event; durable on return.

        Raises:
            StorageError: if it cannot be written.
        """
        known = {name: _text(value) if isinstance(value, str) else value for name, value in fields.items()}
        append_line(self.path, seal_line({"event": event, "time": round(time.time(), 3), **known}))

    def read(self) -> Iterator[dict[str, Any]]:
        """All whole events, oldest first."""
        self.garbled = 0
        if not self.path.is_file():
            return
        with self.path.open("rb") as stream:
            while line := stream.readline(_MAX_LINE):
                event = unseal_line(line)
                if event is not None:
                    yield event
                elif line.strip():
                    self.garbled += 1

    def reasons(self) -> dict[tuple[str, str], str]:
        """(series, key) -> the reason recorded last, for every entry that ever failed."""
        return {
            (str(e.get("series")), str(e.get("key"))): str(e.get("reason"))
            for e in self.read()
            if e.get("event") == "failed"
        }


def _text(value: str) -> str:
    """``value`` as UTF-8 can hold it: file names may not be."""
    return value.encode("utf-8", "backslashreplace").decode()
