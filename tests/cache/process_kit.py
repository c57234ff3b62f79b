"""Work in processes of their own, to be killed: at any moment, or right before one of their file operations."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any, TypeAlias

from cache_kit import FakeOs

from cogcache.cache import files

Body: TypeAlias = Callable[[Path, Callable[[str], object]], Any]
"""What a process does to a cache; it tells the key of each entry that is durable. Must be importable by name."""


def _child(body: Body, root: Path, pipe: Connection, stop_at: int | None, torn: bool) -> None:
    if stop_at is not None:
        files.os = FakeOs(stop_at, torn=torn, kill=True)  # type: ignore[attr-defined]
    pipe.send("start")
    body(root, pipe.send)
    pipe.send("end")


@dataclass(frozen=True)
class Outcome:
    """How a process ended: killed, or through; the keys it called durable; its time from start to end."""

    killed: bool
    told: frozenset[str]
    seconds: float


class Run:
    """A process at work on a cache.

    Args:
        stop_at: Number of the file operation, from 0, in place of which it kills itself. Its fsyncs do nothing, as
            a kill takes nothing from the page cache.
        torn: If that operation is a write, half of it is written first.
    """

    def __init__(
        self,
        processes: ForkServerContext,
        body: Body,
        root: Path,
        stop_at: int | None = None,
        torn: bool = False,
    ) -> None:
        self._pipe, send = processes.Pipe(duplex=False)
        self._process = processes.Process(target=_child, args=(body, root, send, stop_at, torn))
        self._process.start()
        send.close()
        assert self._pipe.recv() == "start"
        self._began = time.monotonic()

    def kill(self) -> None:
        """SIGKILL, without waiting for the end."""
        self._process.kill()

    def join(self) -> Outcome:
        """Wait for its end."""
        self._process.join()
        seconds = time.monotonic() - self._began
        said = drain(self._pipe)
        through = said[-1:] == ["end"]
        assert self._process.exitcode in ((0, -signal.SIGKILL) if through else (-signal.SIGKILL,)), said
        return Outcome(not through, frozenset(said) - {"end"}, seconds)


def drain(pipe: Connection) -> list[str]:
    """Everything that a process that has ended said."""
    said = []
    try:
        while True:
            said.append(pipe.recv())
    except (EOFError, OSError):
        pipe.close()
        return said
