"""One series of a cache as it lies on disk: which shards are committed, planned, half done.

Plans are decided before any work, so what ends up in which shard depends on the order of the keys alone. A
plan ``<name>.plan.json`` stays until the index of its shard is there. Everything here that looks at several
files, or changes any, is called under the cache lock.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from contextlib import suppress
from pathlib import Path
from typing import Any

from cogcache.cache.backend import PART, backend_of, data_files
from cogcache.cache.damage import mend_hint
from cogcache.cache.files import FileLock, make_folder, remove, sync_folder, write_atomic
from cogcache.cache.format import MAX_SLOTS, Identity, ZarrCompression
from cogcache.cache.index import ShardIndex, check_key, parse_index
from cogcache.cache.lines import dump_sealed, load_sealed
from cogcache.cache.names import ShardName, check_series, parse_shard
from cogcache.cache.regular import read_regular
from cogcache.cache.shard import ShardWriter, durable_keys
from cogcache.cache.stored import head_facts
from cogcache.errors import DamagedCacheError

__all__ = ["SeriesFolder"]


class SeriesFolder:
    """The folder of one series."""

    def __init__(
        self, root: Path, identity: Identity, series: str, compression: ZarrCompression = "zstd"
    ) -> None:
        self.series = check_series(series)
        self.path = root / series
        self._backend = backend_of(identity.backend, compression)
        self._facts = head_facts(series, identity.model.variant, identity.series[series])
        self._known: dict[str, ShardIndex] = {}
        make_folder(self.path)

    def _names(self, suffix: str) -> list[str]:
        """Names of the shards that have a file with ``suffix``, by group and number."""
        found = []
        for file in self.path.iterdir():
            name, _, rest = file.name.removeprefix(".").partition(".")
            if rest == suffix:
                with suppress(ValueError):
                    found.append(parse_shard(name, self.series))
        return [str(name) for name in sorted(found)]

    def committed(self) -> list[str]:
        """Names of all committed shards."""
        return self._names("index.jsonl")

    def unfinished(self) -> list[str]:
        """Names of the shards that are planned and not committed."""
        done = set(self.committed())
        return [name for name in self._names("plan.json") if name not in done]

    def index(self, name: str) -> ShardIndex:
        """The index of a committed shard, remembered.

        Raises:
            DamagedCacheError: if it is cut or changed, or the shard is missing or of another size.
        """
        if name not in self._known:
            path, data = self.path / f"{name}.index.jsonl", self.data(name)
            try:
                index = parse_index(read_regular(path))
                if self._size(name) != index.bytes:
                    raise ValueError(f"{data.name} is missing or its size has changed")
            except (OSError, ValueError) as error:
                raise self._damaged(path, name, error) from None
            self._known[name] = index
        return self._known[name]

    def data(self, name: str) -> Path:
        """The data file of a committed shard."""
        return self.path / self._backend.data_file(name)

    def _size(self, name: str) -> int:
        """Bytes of the data file, here or on the server that it was sent to; -1 if it is nowhere."""
        data, pushed = self.data(name), self.pushed(name)
        if data.is_file():
            return data.stat().st_size
        return int(pushed.read_bytes()) if pushed.is_file() else -1

    def side_file(self, name: str) -> Path | None:
        """The file that tells other programs of a shard, where it has one."""
        file = self._backend.side_file(name)
        return self.path / file if file else None

    def pushed(self, name: str) -> Path:
        """The file that stands for the data of a shard that was sent to a server: its size, in decimal digits."""
        return self.path / f"{name}.pushed"

    def plan(self, name: str) -> tuple[str, ...]:
        """The keys planned for an unfinished shard, in order.

        Raises:
            DamagedCacheError: if the plan is damaged.
        """
        return self._plan(name)[0]

    def _plan(self, name: str) -> tuple[tuple[str, ...], int]:
        """Keys, and most entries that a shard of the group may hold, 0 where any number may be."""
        path = self.path / f"{name}.plan.json"
        try:
            value = load_sealed(read_regular(path))
            if value["shard"] != name or not isinstance(value["keys"], list):
                raise ValueError("it is the plan of another shard")
            keys, slots = tuple(check_key(key) for key in value["keys"]), value.get("slots", 0)
            if self._backend.fixed_slots and not (type(slots) is int and len(keys) <= slots <= MAX_SLOTS):
                raise ValueError("its number of slots is none, or too small for its keys")
        except (OSError, ValueError, KeyError) as error:
            raise self._damaged(path, name, error) from None
        return keys, slots

    def _damaged(self, path: Path, name: str, error: Exception) -> DamagedCacheError:
        return DamagedCacheError(
            f"{path} is damaged: {error}.",
            mend_hint(self.path, name),
        )

    def durable(self, name: str) -> list[str]:
        """Keys of an unfinished shard that are on disk already."""
        return durable_keys(self.path, name, self._backend.data_file(name))

    def committed_keys(self) -> set[str]:
        """Keys of all entries in committed shards."""
        return {key for name in self.committed() for key in self.index(name).entries}

    def durable_keys(self) -> set[str]:
        """Keys of all entries that are on disk, in committed and in unfinished shards."""
        return self.committed_keys().union(*(self.durable(name) for name in self.unfinished()))

    def settled_keys(self) -> set[str]:
        """Keys that are on disk, or that some unfinished shard may still get: they need no new plan."""
        keys = self.committed_keys()
        for name in self.unfinished():
            durable = self.durable(name)  # once: the shard's holder goes on appending meanwhile
            keys.update(durable, after(self.plan(name), durable))
        return keys

    def add_plans(self, keys: Sequence[str], entries_per_shard: int, group: str = "") -> dict[str, int]:
        """Decide the shards of ``keys``, in this order; returns how many each new shard is to get.

        Args:
            group: Shape that the entries share, ``"49x480x720"``; shards are numbered within it.
        """
        used = [parse_shard(name) for s in ("index.jsonl", "plan.json") for name in self._names(s)]
        used += [parse_shard(name) for name, tail, _ in data_files(self._backend, self.path) if not tail]
        first = max((name.number for name in used if name.group_text == group), default=-1) + 1
        slots = self._backend.slots(self.path, group, entries_per_shard, len(keys), self._facts)
        made: dict[str, int] = {}
        if keys:
            sync_folder(self.path)  # the plans before may be just renamed by a killed process
        for number, start in enumerate(range(0, len(keys), slots), first):
            name = str(ShardName.of(self.series, group, number))
            value: dict[str, Any] = {"shard": name, "keys": list(keys[start : start + slots])}
            value |= {"slots": slots} if self._backend.fixed_slots else {}
            write_atomic(self.path / f"{name}.plan.json", dump_sealed(value))
            made[name] = len(keys[start : start + slots])
        return made

    def claim(self, name: str) -> FileLock | None:
        """Take the lock of an unfinished shard; None while another holds it."""
        return FileLock.acquire(self.path / f".{name}.lock", wait=False)

    def is_claimed(self, name: str) -> bool:
        """Whether anybody fills this unfinished shard."""
        claim = self.claim(name)
        if claim is not None:
            claim.release()
        return claim is None

    def plan_is_foreign(self, name: str, wanted: Set[str]) -> bool:
        """Whether an unfinished shard has nothing to do with the keys that are wanted."""
        return not wanted or wanted.isdisjoint(self.plan(name))

    def open_shard(self, name: str) -> ShardWriter:
        """Open a claimed shard for writing, where a killed process left it."""
        keys, slots = self._plan(name)
        return ShardWriter(self.path, name, self._backend.layout(self.path, name, self._facts, slots), keys)

    def drop_plan(self, name: str) -> None:
        """Remove the plan and the lock of a shard that is committed or came to nothing."""
        remove(self.path / f"{name}.plan.json", self.path / f".{name}.lock")

    def sweep(self) -> None:
        """Remove what killed processes left and nobody needs."""
        done, planned = set(self.committed()), set(self.unfinished())
        parts = [p for n, tail, p in data_files(self._backend, self.path) if tail == PART and n in done]
        waste = [f"{n}.{s}" for s in ("index.part", "plan.json") for n in self._names(s) if n in done]
        waste += [f".{name}.lock" for name in self._names("lock") if name not in planned]
        waste += [f"{n}.{s}" for s in ("index.jsonl.tmp", "plan.json.tmp") for n in self._names(s)]
        if parts or waste:
            sync_folder(self.path)  # the index that makes it waste may be just renamed by a killed process
        remove(*parts, *(self.path / name for name in waste))


def after(plan: Sequence[str], durable: Sequence[str]) -> tuple[str, ...]:
    """The part of a plan behind its last durable entry: a shard only grows, in the order of its plan."""
    places = {key: place for place, key in enumerate(plan)}
    last = max((places.get(key, -1) for key in durable), default=-1)
    return tuple(plan[last + 1 :])
