"""What runs on a cache while it is killed or its power is cut, and what must come of it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest
from cache_kit import FakeOs, install, snapshot
from kill_kit import Kept, Lists, check_after_kill, encode_until_idle, encoding
from process_kit import Body, Run
from verify_kit import flip_tensor, latent_key

from cogcache.cache.backend import BACKENDS
from cogcache.cache.check import check_cache
from cogcache.cache.format import LATENTS, BackendName
from cogcache.cache.repair import repair_cache
from cogcache.cache.transfer import export_shards, merge_shards
from cogcache.errors import CacheError

BAD = frozenset({1})
SOURCE = Lists(3, per_shard=2, draws=1, prompts=1)
ZARR: BackendName = "zarr"


@contextmanager
def finished_is_fine() -> Iterator[None]:
    """Killed after its last rename, the cache is finished; the same command says so."""
    try:
        yield
    except CacheError as error:
        if "holds a finished cache" not in error.message:
            raise


def export(root: Path, _: Callable[[str], object], *, source: Path) -> None:
    with finished_is_fine():
        export_shards(source, root, limit=2)


def merge(root: Path, _: Callable[[str], object], *, source: Path) -> None:
    with finished_is_fine():
        merge_shards(root, [source, source])


def repair(root: Path, _: Callable[[str], object] = str) -> None:
    repair_cache(check_cache(root), "some/model")


@dataclass(frozen=True)
class Scenario:
    """What runs on a cache while it is killed.

    Args:
        body: Makes it, given a finished cache of :data:`SOURCE`.
        before: What a finished cache holds when the run begins; None: there is none.
        backend: How the shards of that cache are stored.
        processes: How many run at the same time.
    """

    name: str
    body: Callable[[Path], Body]
    before: Lists | None = None
    backend: BackendName = "webdataset"
    processes: int = 1


def encode_scenario(name: str, lists: Lists, before: Lists | None = None) -> Scenario:
    return Scenario(name, lambda _: encoding(lists), before)


def three_encode(backend: BackendName) -> Scenario:
    body = partial(encode_until_idle, lists=Lists(8, bad=BAD, draws=1, prompts=1, backend=backend))
    return Scenario(f"{backend}: three encode together", lambda _: body, processes=3)


TOGETHER = [three_encode(backend) for backend in BACKENDS]
SCENARIOS = [
    encode_scenario("encode, one shard", Lists(4, per_shard=100)),
    encode_scenario("encode, many shards, clips that fail", Lists(3, per_shard=1, bad=BAD)),
    encode_scenario("encode, image conditions and prompts", Lists(2, per_shard=3, draws=2, prompts=1)),
    encode_scenario("encode, clips added", Lists(5, per_shard=2, bad=BAD), Lists(3, per_shard=2, bad=BAD)),
    Scenario("export", lambda source: partial(export, source=source)),
    Scenario("merge", lambda source: partial(merge, source=source)),
    encode_scenario(
        "zarr: encode, many shards, clips that fail", Lists(3, per_shard=1, bad=BAD, backend=ZARR)
    ),
    encode_scenario(
        "zarr: encode, clips added",
        Lists(5, per_shard=2, bad=BAD, draws=1, prompts=1, backend=ZARR),
        Lists(3, per_shard=2, bad=BAD, draws=1, prompts=1, backend=ZARR),
    ),
    Scenario("zarr: export", lambda source: partial(export, source=source), backend=ZARR),
]


class Trial:
    """A scenario with what it makes where nothing disturbs it: ``expected``, after ``steps`` file operations.

    It begins with what is in the folder ``start``, if that is there.
    """

    def __init__(
        self, scenario: Scenario, source: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.name, self.body = scenario.name, scenario.body(source / scenario.backend)
        self._processes = scenario.processes
        self._folder, self._caches = folder, 0
        self.start = folder / "start"
        install(FakeOs(), monkeypatch)
        if scenario.before is not None:
            encoding(scenario.before)(self.start, str)
        self.before = Kept.of(self.start)
        self.finished = scenario.before is not None
        whole = self.begin()
        fake = install(FakeOs(), monkeypatch)
        self.body(whole, str)
        self.steps, self.expected, self.keys = fake.steps, snapshot(whole), Kept.of(whole).keys

    def begin(self) -> Path:
        """A new cache in the state in which the run begins."""
        root = self._folder / f"cache-{self._caches}"
        self._caches += 1
        if self.start.exists():
            shutil.copytree(self.start, root)
        return root

    def launch(self, context: ForkServerContext, root: Path, stop_at: int | None = None) -> list[Run]:
        """The processes of the scenario; the first kills itself in place of its operation ``stop_at``, if any."""
        stops = [stop_at, *[None] * (self._processes - 1)]
        return [
            Run(context, self.body, root, stop, torn=stop is not None and stop % 2 == 1) for stop in stops
        ]

    def progress(self, there: Collection[str]) -> float:
        """How many of the entries to make are durable, 0 to 1."""
        new = self.keys - self.before.keys
        return len(new.intersection(there)) / len(new)

    def check(self, root: Path) -> Kept:
        """What must hold of a cache in which it was stopped."""
        return check_after_kill(root, self.before, frozenset(), self.finished)

    def finish(self, root: Path, kept: Kept) -> None:
        """The same run again, undisturbed: it makes only what is missing, and the cache is as if nothing had been."""
        made: list[str] = []
        self.body(root, made.append)
        assert kept.keys.isdisjoint(made)
        assert snapshot(root) == self.expected
        assert check_cache(root).report.whole
        shutil.rmtree(root)


class RepairTrial:
    """As :class:`Trial`: repair of a cache with damaged entries in two shards, and an index lost; then encode."""

    def __init__(self, backend: BackendName, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.name, self.body, self.start = f"{backend}: repair", repair, folder / "start"
        lists = Lists(6, per_shard=3, prompts=1, backend=backend)
        self._encode, mended = encoding(lists), folder / "mended"
        install(FakeOs(), monkeypatch)
        self._encode(self.start, str)
        for clip in (1, 5):  # one of them in the last shard
            flip_tensor(self.start, LATENTS, latent_key(clip))
        next(iter(sorted(self.start.glob("text/*.index.jsonl")))).unlink()
        self._damaged = {latent_key(1), latent_key(5)}
        self._good = lists.keys() - self._damaged
        shutil.copytree(self.start, mended)
        fake = install(FakeOs(), monkeypatch)
        repair(mended)
        self.steps, self.expected = fake.steps, snapshot(mended)
        self._encode(mended, str)
        self._remade = snapshot(mended)

    def check(self, root: Path) -> Kept:
        """No good entry is lost: but for the shard without index, which a data file holds, all are in indexes."""
        kept = Kept.of(root)
        data = [path.read_bytes() for path in (root / "text").rglob("*") if path.is_file()]
        assert all(any(key.encode() in some for some in data) for key in self._good - kept.keys)
        assert all(len(shards) == 1 for shards in kept.shards.values())
        return kept

    def finish(self, root: Path, _: Kept) -> None:
        """Repair again, then encode: the cache is as if nothing had been, and only what was damaged is made."""
        repair(root)
        assert snapshot(root) == self.expected
        assert check_cache(root).report.whole
        made: list[str] = []
        self._encode(root, made.append)
        assert set(made) == self._damaged
        assert snapshot(root) == self._remade
        shutil.rmtree(root)


def make_sources(folder: Path) -> Path:
    """Finished caches to export and merge from, by backend."""
    for backend in BACKENDS:
        assert encoding(replace(SOURCE, backend=backend))(folder / backend, str)
    return folder
