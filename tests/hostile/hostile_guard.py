"""What no hostile file may bring about: other errors than ours, endless work, much memory, other files, pickles.

An audit hook cannot be taken away again, so there is one for the whole process, and a :class:`Guard` switches it on.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["Guard", "HangError"]

CPU_SECONDS = 10
MEMORY_BYTES = 1 << 30
_PICKLE = {"pickle.find_class", "marshal.load", "marshal.loads"}
_RUNS = {"os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "socket.connect"}
_CHANGES = {"os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate"}


class HangError(BaseException):
    """A case took more processor time than any honest work on so small a file."""


class Guard:
    """Watches what one case does.

    Attributes:
        breaches: What it did that it must not, in words.
        opened: How many files were opened while it was watching.
    """

    _active: Guard | None = None
    _hooked = False

    def __init__(self, *folders: Path, ports: tuple[int, ...] = ()) -> None:
        self._ports = ports
        self.breaches: list[str] = []
        self.opened = 0
        libraries = {
            sys.prefix,
            sys.base_prefix,
            *sysconfig.get_paths().values(),
            *filter(os.path.isdir, sys.path),
        }
        self._ours = tuple(os.path.realpath(folder) for folder in folders)
        self._readable = (
            *self._ours,
            *map(os.path.realpath, libraries),
            "/dev/null",
            "/proc/self",
            "/proc/meminfo",
            "/sys/fs/cgroup/cpu.max",
        )
        if not Guard._hooked:
            sys.addaudithook(_hook)
            Guard._hooked = True

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Within this, at most so much processor time is taken, and all that happens is looked at."""

        def hang(*_: object) -> None:
            raise HangError

        before = signal.signal(signal.SIGPROF, hang)
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        Guard._active = self
        try:
            yield
        finally:
            Guard._active = None
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.signal(signal.SIGPROF, before)

    def see(self, event: str, args: tuple[Any, ...]) -> None:
        """Judge one audit event."""
        if event == "open":
            self.opened += 1
            path, mode, flags = args
            writes = flags & (os.O_WRONLY | os.O_RDWR) if isinstance(flags, int) else "r" not in (mode or "r")
            self._judge(event, path, self._ours if writes else self._readable)
        elif event in _CHANGES:
            self._change(event, args)
        elif event in ("os.listdir", "os.scandir"):
            self._judge(event, args[0], self._readable)
        elif event in _PICKLE and not _is_import():
            self.breaches.append(f"{event} {args[:1]!r:.80}")
        elif event == "socket.connect" and args[1][0] == "127.0.0.1" and args[1][1] in self._ports:
            pass
        elif event in _RUNS:
            self.breaches.append(f"{event} {args!r:.200}")

    def _change(self, event: str, args: tuple[Any, ...]) -> None:
        """The name that changes is that of a link, not of what it leads to."""
        for path in args[1:2] if event == "os.symlink" else args[:2]:
            if isinstance(path, str | bytes | os.PathLike):
                link = Path(os.fsdecode(path)).absolute()
                self._judge(event, str(link.parent.resolve() / link.name), self._ours, follow=False)

    def _judge(self, event: str, path: Any, allowed: tuple[str, ...], *, follow: bool = True) -> None:
        if not isinstance(path, str | bytes | os.PathLike):
            return  # a file descriptor: it was judged when it was opened
        try:
            real = os.path.realpath(os.fsdecode(path)) if follow else path
        except ValueError:  # a NUL: the system refuses it
            return
        if not any(real == folder or real.startswith(folder + os.sep) for folder in allowed):
            self.breaches.append(f"{event} {real!r:.200}")


def _is_import() -> bool:
    """Whether the import system is at work: it unmarshals its own compiled files."""
    frame = sys._getframe(2)
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def _hook(event: str, args: tuple[Any, ...]) -> None:
    guard = Guard._active
    if guard is not None:
        Guard._active = None  # what the judging itself opens does not count
        try:
            guard.see(event, args)
        finally:
            Guard._active = guard


@contextmanager
def little_memory() -> Iterator[None]:
    """Within this, the process may take ``MEMORY_BYTES`` of addresses more than it has; beyond, ``MemoryError``."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY_BYTES, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
