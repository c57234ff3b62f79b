"""What a backend must provide: how the entries of a shard lie in its data file, and what that file is called.

Planning, appending durably, committing and recovering are the same for all (:mod:`cogcache.cache.shard`); a backend
turns entries into bytes and back. Every entry has two members, ranges of bytes in the data file: first its tensors,
then its facts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Protocol, get_args

from cogcache.cache.format import BackendName, Entry, EntryRecord, Identity, ZarrCompression
from cogcache.cache.index import ShardIndex
from cogcache.cache.stored import Contents
from cogcache.cache.tensors import Buffer

__all__ = ["BACKENDS", "DAMAGED", "PART", "Backend", "Layout", "backend_of", "data_files"]

PART = ".part"
"""Behind the name of a data file that is being filled."""
DAMAGED = ".damaged"
"""Behind the name of a data file that a repair has set aside."""


class Layout(Protocol):
    """The bytes of one shard's data file: a head, the entries one directly after another, an end.

    The first entry seen may decide what the others must be like, so entries are given in the order of the shard.

    Attributes:
        file: Name of the data file, relative to the folder of the series.
        head: First bytes of the file.
    """

    file: str
    head: bytes

    def pack(self, entry: Entry, start: int) -> tuple[bytes, EntryRecord]:
        """The bytes of an entry that begins at byte ``start``, and its record.

        Raises:
            CacheError: if such an entry cannot be in this shard.
        """

    def pack_contents(self, key: str, contents: Contents, start: int) -> tuple[bytes, EntryRecord]:
        """As :meth:`pack`, from an entry's bytes as :mod:`cogcache.cache.stored` spells them."""

    def entry_size(self, record: EntryRecord) -> int:
        """Bytes that an entry takes up in the file."""

    def is_entry(self, record: EntryRecord, data: bytes, start: int) -> bool:
        """Whether ``data``, which begins at byte ``start`` of the file, is exactly the recorded entry."""

    def end(self, records: Sequence[EntryRecord]) -> bytes:
        """The bytes behind the last entry."""

    def publish(self, entries: int) -> None:
        """Tell other programs of the shard, whose data file is in place: after this, its index is written.

        The caller holds the cache lock.
        """


class Backend(Protocol):
    """One way to store shards.

    Attributes:
        fixed_slots: All shards of a group may hold the same number of entries, decided by the first plan.
    """

    fixed_slots: bool

    def data_file(self, shard: str) -> str:
        """Name of the data file of a shard, relative to the folder of its series, with ``/``."""

    def shard_of(self, series: str, file: str) -> str | None:
        """The shard whose data file this is, relative to the folder of the series; None if it is none."""

    def layout(self, folder: Path, shard: str, facts: dict[str, Any], slots: int) -> Layout:
        """The bytes of a shard.

        Args:
            folder: Folder of the series.
            facts: What the shard says of itself, :func:`cogcache.cache.stored.head_facts`.
            slots: Most entries that a shard of its group may hold.
        """

    def member_names(self, key: str) -> tuple[str, str]:
        """Names of the two members of an entry, as an index spells them."""

    def unpack(self, key: str, members: Sequence[Buffer]) -> Entry:
        """The entry whose members hold these bytes.

        Raises:
            ValueError: if they hold none.
        """

    def contents(self, key: str, members: Sequence[Buffer]) -> Contents:
        """As :meth:`unpack`, as bytes in the spelling of :mod:`cogcache.cache.stored`; every checksum is checked."""

    def facts(self, key: str, member: Buffer) -> dict[str, Any]:
        """The facts, from the second member alone. Raises as :meth:`unpack` does."""

    def slots(self, folder: Path, group: str, wanted: int, planned: int, facts: dict[str, Any]) -> int:
        """Most entries that a new shard of this group in the folder of a series may hold.

        Args:
            wanted: What a run asks for; where shards of the group must be alike, it is that of those that are there.
            planned: Entries for which shards are wanted now.
            facts: What shards of the series say of themselves.
        """

    def side_file(self, shard: str) -> str | None:
        """The one of :meth:`side_files` that a shard has, relative to the folder of its series; None if none."""

    def side_files(
        self, root: Path, identity: Identity, shards: Mapping[str, Mapping[str, ShardIndex]]
    ) -> dict[str, bytes]:
        """Files that tell other programs of the cache in ``root``, by name relative to it. The reader needs none.

        Args:
            shards: Series -> committed shard -> index.
        """

    def read_head(self, stream: BinaryIO, size: int) -> dict[str, Any]:
        """What a data file of ``size`` bytes says of itself.

        Raises:
            ValueError: if it does not begin like a shard.
        """

    def walk(self, stream: BinaryIO, size: int, start: int) -> Iterator[EntryRecord]:
        """Records of the entries from byte ``start`` on, as the data file itself tells them.

        Raises:
            ValueError: where it does not go on like a shard.
        """


BACKENDS: tuple[BackendName, ...] = get_args(BackendName)
"""Names of all backends."""


def backend_of(name: BackendName, compression: ZarrCompression = "zstd") -> Backend:
    """The backend that an identity or a manifest names.

    Args:
        compression: Of new zarr arrays; those that are there keep theirs.
    """
    from cogcache.cache.tar import TarBackend
    from cogcache.cache.zarr.shard import ZarrBackend

    return ZarrBackend(compression) if name == "zarr" else TarBackend()


def data_files(backend: Backend, folder: Path) -> Iterator[tuple[str, str, Path]]:
    """Data files in the folder of a series: shard, what is behind the name (:data:`PART`, :data:`DAMAGED` or nothing),
    and path; in no order.
    """
    below = [path for path in folder.iterdir() if path.is_dir() and not path.is_symlink()]
    for path in (path for place in (folder, *below) for path in place.iterdir()):
        name = path.relative_to(folder).as_posix()
        tail = next((tail for tail in (PART, DAMAGED) if name.endswith(tail)), "")
        shard = backend.shard_of(folder.name, name.removesuffix(tail))
        if shard is not None:
            yield shard, tail, path
