"""Work in processes of their own, to be killed: at any moment, or right before one of their file operations.

They tell of every file operation and of every durable entry. None runs far ahead of who listens, so that a kill comes
about when it was meant to, however busy the machine is.
"""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable, Sequence
from multiprocessing import connection
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from multiprocessing.synchronize import Semaphore
from pathlib import Path
from typing import Any, TypeAlias

from cache_kit import FakeOs

from cogcache.cache import files

Body: TypeAlias = Callable[[Path, Callable[[str], object]], Any]
"""What a process does to a cache; it tells the key of each entry that is durable. Must be importable by name."""

AHEAD = 12
"""File operations of a process that nobody needs to have heard of yet."""
A_MOMENT = 0.0005
"""Seconds, at most, from what was heard to the kill: about :data:`AHEAD` operations where nothing else runs."""
_START, _OPERATION, _END = "start", "operation", "end"


def _child(body: Body, root: Path, pipe: Connection, may: Semaphore, stop_at: int | None, torn: bool) -> None:
    def tell() -> None:
        may.acquire()
        pipe.send(_OPERATION)

    pipe.send(_START)
    module: Any = files
    module.os = FakeOs(stop_at, torn=torn, kill=True, tell=tell)
    body(root, pipe.send)
    pipe.send(_END)


class Run:
    """A process at work on a cache, from :func:`listen` on. Its fsyncs do nothing: a kill leaves the page cache.

    Args:
        stop_at: Number of the file operation, from 0, in place of which it kills itself.
        torn: If that operation is a write, half of it is written first.

    Attributes:
        operations: File operations it told of, each before it did it.
        told: Keys it called durable.
        ended: Whether it has said all that it ever will.
        killed: Whether that was before it was through.
    """

    def __init__(
        self,
        processes: ForkServerContext,
        body: Body,
        root: Path,
        stop_at: int | None = None,
        torn: bool = False,
    ) -> None:
        self.operations, self.told, self.ended, self.killed = 0, list[str](), False, True
        self.pipe, send = processes.Pipe(duplex=False)
        self._may, self._begun = processes.Semaphore(0), False
        self._process = processes.Process(target=_child, args=(body, root, send, self._may, stop_at, torn))
        self._process.start()
        send.close()
        assert self.pipe.recv() == _START

    def begin(self) -> None:
        """Let it go to work, if it has not yet."""
        for _ in range(0 if self._begun else AHEAD):
            self._may.release()
        self._begun = True

    def hear(self) -> None:
        """Wait for one thing that it says, or for its end."""
        try:
            said = self.pipe.recv()
        except (EOFError, OSError):  # killed in the middle of a word, perhaps
            self.ended = True
            self.pipe.close()
            return
        if said == _OPERATION:
            self.operations += 1
            self._may.release()
        elif said == _END:
            self.killed = False
        else:
            self.told.append(said)

    def kill(self) -> None:
        """SIGKILL, without waiting for the end."""
        self._process.kill()

    def join(self) -> None:
        """Wait for its end, which must be a SIGKILL or, of one that was through, none."""
        self._process.join()
        assert self._process.exitcode in ((-signal.SIGKILL,) if self.killed else (0, -signal.SIGKILL))


def listen(runs: Sequence[Run], until: Callable[[], bool]) -> None:
    """Let processes work side by side until it is so, or all have ended."""
    for run in runs:
        run.begin()
    while not until():
        speakers: dict[Any, Run] = {run.pipe: run for run in runs if not run.ended}
        if not speakers:
            return
        for pipe in connection.wait(speakers):
            speakers[pipe].hear()


def kill_at_random(runs: Sequence[Run], victims: Sequence[Run], most: int, dice: random.Random) -> None:
    """SIGKILL ``victims`` when ``runs`` have told of fewer than ``most`` operations in all, in or between two."""
    heard = dice.randrange(most)
    listen(runs, lambda: sum(run.operations for run in runs) >= heard)
    time.sleep(dice.uniform(0, A_MOMENT))
    for victim in victims:
        victim.kill()


def hear_out(some: Sequence[Run], runs: Sequence[Run]) -> None:
    """Let processes work side by side until some of them have ended."""
    listen(runs, lambda: all(run.ended for run in some))


def join(runs: Sequence[Run]) -> frozenset[str]:
    """Let processes work to their ends; gives the keys that they called durable."""
    hear_out(runs, runs)
    for run in runs:
        run.join()
    told = [key for run in runs for key in run.told]
    assert len(told) == len(set(told)), "an entry was made twice"
    return frozenset(told)


def drain(pipe: Connection) -> list[str]:
    """Everything that a process that has ended said."""
    said = []
    try:
        while True:
            said.append(pipe.recv())
    except (EOFError, OSError):
        pipe.close()
        return said
