"""Power cut after every file operation: whatever of it reached the disk, nothing committed is lost.

A run is recorded once; then each state that a disk may hold at each cut is laid out, checked, and the run is finished.
All states: pytest -m slow tests/cache/test_power_cuts.py.
"""

from __future__ import annotations

import hashlib
import random
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TypeAlias

import pytest
from cache_kit import FakeOs, install
from kill_kit import Lists
from power_kit import Create, Disk, Files, Op, RecordOs, lay_out, record
from scenario_kit import BAD, SCENARIOS, ZARR, RepairTrial, Scenario, Trial, encode_scenario, make_sources

from cogcache.errors import CogcacheError

AnyTrial: TypeAlias = Trial | RepairTrial
Make: TypeAlias = Callable[[Path, Path, pytest.MonkeyPatch], AnyTrial]
FEW = [
    encode_scenario("encode", Lists(3, per_shard=2, bad=BAD)),
    encode_scenario("zarr: encode", Lists(2, per_shard=2, backend=ZARR)),
    SCENARIOS[3],
    SCENARIOS[-1],
]
SAMPLE, MOST = 25, 64
"""States checked in the default suite, of each scenario; most states of a cut that are looked at otherwise."""
STRIDE, STATES = 10, 20
"""Every so manieth operation is one before which a run is killed; states checked after each."""


def made(scenario: Scenario) -> Make:
    return lambda source, folder, monkeypatch: Trial(scenario, source, folder, monkeypatch)


REPAIRS: list[Make] = [
    lambda _, folder, monkeypatch: RepairTrial("webdataset", folder, monkeypatch),
    lambda _, folder, monkeypatch: RepairTrial(ZARR, folder, monkeypatch),
]
NAMES = ["tar: repair", "zarr: repair"]
few = pytest.mark.parametrize("make", [*map(made, FEW), *REPAIRS], ids=[s.name for s in FEW] + NAMES)
every = pytest.mark.parametrize(
    "make", [*map(made, SCENARIOS), *REPAIRS], ids=[s.name for s in SCENARIOS] + NAMES
)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Finished caches to export and merge from, by backend. Read only."""
    return make_sources(tmp_path_factory.mktemp("source"))


class Replay:
    """A recorded run of a trial.

    Args:
        kill_at: As :func:`power_kit.record` says.
        unsynced: As there.
    """

    def __init__(
        self, trial: AnyTrial, folder: Path, kill_at: int | None = None, unsynced: str | None = None
    ) -> None:
        self.trial, self._folder, base = trial, folder, folder / "recorded"
        base.mkdir(parents=True)
        if trial.start.exists():
            shutil.copytree(trial.start, base / "cache")
        self.recorded: RecordOs = record(
            base, lambda: trial.body(base / "cache", str), kill_at=kill_at, unsynced=unsynced
        )
        self._known: dict[bytes, set[str]] = {}

    def states(self, most: int, dice: random.Random) -> Iterator[tuple[Files, frozenset[str], bool]]:
        """Each state with what must be in it: the keys that were told, and whether all is done."""
        disk, ops = Disk.of(self.recorded), self.recorded.ops
        for place in range(len(ops) + 1):
            for files in disk.states(most, dice):
                yield files, frozenset(disk.told), place == len(ops)
            if place < len(ops):
                disk.do(ops[place])

    def check(self, files: Files, told: frozenset[str], done: bool) -> None:
        """Nothing is lost or damaged, and a new run finishes it; if it had finished, it is finished."""
        known = digest(files)
        if known not in self._known:
            base = self._folder / "state"
            lay_out(files, base)
            kept = self.trial.check(base / "cache")
            self._known[known] = kept.keys
            self.trial.finish(base / "cache", kept)
            shutil.rmtree(base)
        assert told <= self._known[known], "an entry that was called durable is gone"
        if done:
            there = {name.removeprefix("cache/"): data for name, data in files.items() if data is not None}
            assert {n: d for n, d in there.items() if n != "journal.jsonl"} == self.trial.expected

    def check_all(self, states: Iterable[tuple[Files, frozenset[str], bool]]) -> None:
        for state in states:
            self.check(*state)

    @property
    def different(self) -> int:
        """Different states that were checked."""
        return len(self._known)


def digest(files: Files) -> bytes:
    known = hashlib.sha256()
    for name, data in sorted(files.items()):
        known.update(f"{name} {len(data or b'')}\n".encode())
        known.update(data or b"")
    return known.digest()


UNSYNCED = {
    "entries": ".tar.part",
    "lines of entries": ".index.part",
    "an index before its rename": ".index.jsonl.tmp",
    "the rename of an index": "cache/latents",
    "identity before its rename": "cache.json.tmp",
    "manifest before its rename": "manifest.json.tmp",
    "tables": "samples.jsonl.next",
    "names in the cache": "cache",
}


@pytest.mark.parametrize("missing", UNSYNCED.values(), ids=UNSYNCED.keys())
def test_a_missing_fsync_is_noticed(
    missing: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial = Trial(FEW[0], source, tmp_path / "trial", monkeypatch)
    replay, dice = Replay(trial, tmp_path, unsynced=missing), random.Random(0)
    install(FakeOs(), monkeypatch)
    states = list(replay.states(8, dice))
    dice.shuffle(states)
    with pytest.raises((AssertionError, CogcacheError)):
        replay.check_all(states)


@few
def test_power_cuts(make: Make, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replay = Replay(make(source, tmp_path / "trial", monkeypatch), tmp_path)
    install(FakeOs(), monkeypatch)
    dice = random.Random(0)
    states = list(replay.states(6, dice))
    assert len(states) > 200
    ends = [state for state in states if state[2]]
    replay.check_all([*dice.sample(states, SAMPLE), ends[0], ends[-1]])


@pytest.mark.slow
@pytest.mark.timeout(3600)
@every
def test_every_power_cut(
    make: Make,
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    record_property: Callable[[str, object], None],
) -> None:
    replay = Replay(make(source, tmp_path / "trial", monkeypatch), tmp_path)
    install(FakeOs(), monkeypatch)
    replay.check_all(replay.states(MOST, random.Random(0)))
    record_property("states", replay.different)
    print(f"{replay.trial.name}: {len(replay.recorded.ops)} operations, {replay.different} different states")


def kill_points(ops: Sequence[Op]) -> list[int]:
    """Right after every new name, before its folder is synced, and now and then."""
    return sorted(
        {place + 1 for place, op in enumerate(ops) if isinstance(op, Create)} | {*range(0, len(ops), STRIDE)}
    )


def test_nothing_rests_on_an_identity_that_a_killed_process_has_just_renamed(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or the power may take its name, and leave the folders that the next run made beside it."""
    trial = Trial(FEW[0], source, tmp_path / "trial", monkeypatch)
    ops = Replay(trial, tmp_path / "whole").recorded.ops
    named = next(n for n, op in enumerate(ops) if isinstance(op, Create) and op.name == "cache.json")
    replay = Replay(trial, tmp_path / "killed", named + 1)
    install(FakeOs(), monkeypatch)
    replay.check_all(islice(replay.states(8, random.Random(0)), 100))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@few
def test_killed_and_later_the_power_is_cut(
    make: Make, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run takes up what another left that was killed: nothing of that needs to have reached the disk by itself."""
    trial, dice, count = make(source, tmp_path / "trial", monkeypatch), random.Random(0), 0
    ops = Replay(trial, tmp_path / "whole").recorded.ops
    for kill_at in kill_points(ops):
        replay = Replay(trial, tmp_path / str(kill_at), kill_at)
        with monkeypatch.context() as patch:
            install(FakeOs(), patch)
            states = list(replay.states(8, dice))
            replay.check_all(dice.sample(states, STATES))
        count += replay.different
    print(f"{trial.name}: {count} different states")
