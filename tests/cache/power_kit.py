"""A recorded sequence of file operations, and what a disk may hold where the power is cut in the middle of it.

The model is stricter than journalling file systems are. Content of a file is sure up to its last fsync; of each change
after it nothing, all, half, or only the length may have arrived, whatever became of the others. Names in a folder are
sure up to the folder's last fsync; of the changes after it any may have arrived, each by itself; a rename arrives
wholly or not at all.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import itertools
import os
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import pytest
from cache_kit import Crash, FakeOs, install

from cogcache.cache.job import ShardJob

Node: TypeAlias = int
"""A file or folder, whatever its name."""
FOLDER = -1
"""Stands for any folder: folders are told apart by their path."""


class Create(NamedTuple):
    """A new name in a folder; with a node, one that is renamed to it from ``source``."""

    folder: str
    name: str
    node: Node
    source: str = ""


class Unlink(NamedTuple):
    folder: str
    name: str


class Write(NamedTuple):
    node: Node
    start: int
    data: bytes


class Truncate(NamedTuple):
    node: Node
    size: int


class Sync(NamedTuple):
    node: Node


class SyncFolder(NamedTuple):
    folder: str


class Told(NamedTuple):
    """The cache has called an entry durable."""

    key: str


NameOp: TypeAlias = Create | Unlink
DataOp: TypeAlias = Write | Truncate
Op: TypeAlias = NameOp | DataOp | Sync | SyncFolder | Told
Arrived: TypeAlias = Literal["nothing", "all", "half", "length", "half and length"]
ARRIVED: tuple[Arrived, ...] = ("nothing", "all", "half", "length", "half and length")
Files: TypeAlias = dict[str, bytes | None]
"""Path -> content; None for a folder."""


class RecordOs(FakeOs):
    """Does every operation and writes it down, in place of ``os`` in :mod:`cogcache.cache.files`.

    Args:
        base: Folder that is there already, all in it durable; nothing outside it is changed.
        unsynced: What ends in this, folder and name, is never synced: a broken program.
    """

    def __init__(self, base: Path, unsynced: str | None = None) -> None:
        super().__init__()
        self.base, self.ops = base, list[Op]()
        self.start: dict[str, tuple[Node, bytes | None]] = {}
        self.stop_at, self._unsynced = sys.maxsize, unsynced
        self._nodes: dict[str, Node] = {}
        self._open_at: dict[int, tuple[str, Node]] = {}
        for path in sorted(base.rglob("*")):
            name = path.relative_to(base).as_posix()
            node = FOLDER if path.is_dir() else self._new(name)
            self.start[name] = (node, None if path.is_dir() else path.read_bytes())

    def __getattr__(self, name: str) -> Any:
        return getattr(self, f"_{name}") if name in self.STEPS else getattr(os, name)

    def _new(self, name: str) -> Node:
        self._nodes[name] = len(self.start) + len(self.ops)
        return self._nodes[name]

    def _add(self, op: Op) -> None:
        if len(self.ops) >= self.stop_at:
            raise Crash
        self.ops.append(op)

    def _split(self, path: Path) -> tuple[str, str]:
        name = path.relative_to(self.base)
        return name.parent.as_posix(), name.name

    def _open(self, path: Path, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_DIRECTORY:
            fd = os.open(path, flags, mode)
            inside = path.is_relative_to(self.base)
            self._open_at[fd] = (path.relative_to(self.base).as_posix() if inside else "..", FOLDER)
            return fd
        name = path.relative_to(self.base).as_posix()
        if not path.exists():
            folder, last = self._split(path)
            self._add(Create(folder, last, self._new(name)))
        elif flags & os.O_TRUNC and path.stat().st_size:
            self._add(Truncate(self._nodes[name], 0))
        fd = os.open(path, flags, mode)
        self._open_at[fd] = (name, self._nodes[name])
        return fd

    def _write(self, fd: int, data: bytes) -> int:
        end = os.fstat(fd).st_size
        node = self._open_at[fd][1]
        appends = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_APPEND
        self._add(Write(node, end if appends else os.lseek(fd, 0, os.SEEK_CUR), bytes(data)))
        return os.write(fd, data)

    def _ftruncate(self, fd: int, size: int) -> None:
        if os.fstat(fd).st_size != size:
            self._add(Truncate(self._open_at[fd][1], size))
        os.ftruncate(fd, size)

    def _fsync(self, fd: int) -> None:
        name, node = self._open_at[fd]
        if self._unsynced is None or not name.endswith(self._unsynced):
            self._add(SyncFolder(name) if node == FOLDER else Sync(node))

    _fdatasync = _fsync

    def _replace(self, source: Path, target: Path) -> None:
        (folder, name), (same, before) = self._split(target), self._split(source)
        assert folder == same
        node = self._nodes[source.relative_to(self.base).as_posix()]
        self._add(Create(folder, name, node, before))
        source.replace(target)
        self._nodes[target.relative_to(self.base).as_posix()] = node

    def _unlink(self, path: Path) -> None:
        if not path.exists():
            raise FileNotFoundError(path)
        self._add(Unlink(*self._split(path)))
        path.unlink()

    def _makedirs(self, path: Path, **_: bool) -> None:
        for folder in reversed([p for p in (path, *path.parents) if not p.exists()]):
            self._add(Create(*self._split(folder), FOLDER))
            folder.mkdir()


@dataclass
class Disk:
    """What is sure and what is under way after some operations."""

    sure: dict[str, dict[str, Node]] = field(default_factory=dict)
    content: dict[Node, bytes] = field(default_factory=dict)
    names: dict[str, list[NameOp]] = field(default_factory=dict)
    data: dict[Node, list[DataOp]] = field(default_factory=dict)
    told: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, recorded: RecordOs) -> Disk:
        """Before the first operation."""
        disk = cls()
        for name, (node, data) in recorded.start.items():
            path = Path(name)
            disk.sure.setdefault(path.parent.as_posix(), {})[path.name] = node
            if data is not None:
                disk.content[node] = data
        return disk

    def do(self, op: Op) -> None:
        """The next operation."""
        if isinstance(op, Create | Unlink):
            self.names.setdefault(op.folder, []).append(op)
        elif isinstance(op, Write | Truncate):
            self.data.setdefault(op.node, []).append(op)
        elif isinstance(op, Sync):
            self.content[op.node] = self._content(op.node, ["all"] * len(self.data.get(op.node, ())))
            self.data.pop(op.node, None)
        elif isinstance(op, SyncFolder):
            self.sure[op.folder] = self._names(op.folder, [True] * len(self.names.get(op.folder, ())))
            self.names.pop(op.folder, None)
        else:
            self.told.add(op.key)

    def _names(self, folder: str, chosen: Sequence[bool]) -> dict[str, Node]:
        names = dict(self.sure.get(folder, {}))
        for op, arrived in zip(self.names.get(folder, ()), chosen, strict=True):
            if not arrived:
                continue
            if isinstance(op, Unlink):
                names.pop(op.name, None)
                continue
            if op.source and names.get(op.source) == op.node:
                del names[op.source]
            names[op.name] = op.node
        return names

    def _content(self, node: Node, chosen: Sequence[Arrived]) -> bytes:
        data = bytearray(self.content.get(node, b""))
        for op, arrived in zip(self.data.get(node, ()), chosen, strict=True):
            if arrived == "nothing":
                continue
            if isinstance(op, Truncate):
                data[:] = data[: op.size].ljust(op.size, b"\0")
                continue
            end = op.start + len(op.data)
            whole = {"all": len(op.data), "length": 0}.get(arrived, len(op.data) // 2)
            length = op.start + whole if arrived == "half" else end
            data[:] = data.ljust(max(length, op.start), b"\0") if whole or arrived != "half" else data
            data[op.start : op.start + whole] = op.data[:whole]
        return bytes(data)

    def states(self, most: int, dice: random.Random) -> Iterator[Files]:
        """States that a power cut may leave: nothing and all of what is under way, then others.

        Args:
            most: Give all there are if these are not more, else so many; but at least four.
        """
        folders = {folder: len(ops) for folder, ops in self.names.items()}
        nodes = {node: len(ops) for node, ops in self.data.items()}
        names, pieces = sum(folders.values()), sum(nodes.values())
        if 2**names * len(ARRIVED) ** pieces <= most:
            each: Iterator[tuple[tuple[bool, ...], tuple[Arrived, ...]]] = itertools.product(
                itertools.product((False, True), repeat=names), itertools.product(ARRIVED, repeat=pieces)
            )
        else:
            extremes: tuple[Arrived, Arrived] = ("nothing", "all")
            ends = itertools.product(
                ((False,) * names, (True,) * names), [(arrived,) * pieces for arrived in extremes]
            )
            drawn = (
                (tuple(dice.choices((False, True), k=names)), tuple(dice.choices(ARRIVED, k=pieces)))
                for _ in range(most - 4)
            )
            each = itertools.chain(ends, drawn)
        for chosen, arrived in each:
            yield self._files(split(chosen, folders), split(arrived, nodes))

    def _files(self, chosen: dict[str, tuple[bool, ...]], arrived: dict[Node, tuple[Arrived, ...]]) -> Files:
        found: Files = {}

        def walk(folder: str) -> None:
            for name, node in self._names(folder, chosen.get(folder, ())).items():
                path = name if folder == "." else f"{folder}/{name}"
                found[path] = None if node == FOLDER else self._content(node, arrived.get(node, ()))
                if node == FOLDER:
                    walk(path)

        walk(".")
        return found


def record(
    base: Path, body: Callable[[], object], *, kill_at: int | None = None, unsynced: str | None = None
) -> RecordOs:
    """What ``body`` does to the files in ``base``.

    Args:
        kill_at: Number of the operation, from 0, before which a first run is killed; then ``body`` runs again.
        unsynced: As :class:`RecordOs` says.
    """
    with pytest.MonkeyPatch.context() as patch:
        recorded = RecordOs(base, unsynced)
        install(recorded, patch)
        add = ShardJob._add

        def adding(self: ShardJob, key: str, write: Callable[[], None]) -> None:
            add(self, key, write)
            recorded.ops.append(Told(key))

        patch.setattr(ShardJob, "_add", adding)
        if kill_at is not None:
            recorded.stop_at = kill_at
            with contextlib.suppress(Crash):
                body()
            gc.collect()  # its locks
            recorded.stop_at = sys.maxsize
        body()
    return recorded


def split(values: Sequence[Any], counts: dict[Any, int]) -> dict[Any, tuple[Any, ...]]:
    """Deal ``values`` out, so many to each."""
    rest = iter(values)
    return {key: tuple(itertools.islice(rest, count)) for key, count in counts.items()}


def lay_out(files: Files, base: Path) -> None:
    """Make the folder ``base`` with these files."""
    base.mkdir()
    for name, data in sorted(files.items()):
        if data is None:
            (base / name).mkdir()
        else:
            (base / name).write_bytes(data)
