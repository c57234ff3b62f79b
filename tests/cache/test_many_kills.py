"""Hundreds of real SIGKILLs. Run by: pytest -m slow tests/cache/test_many_kills.py, which prints how many."""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest
from cache_kit import snapshot
from kill_kit import Lists, Tally, check_after_kill, encoding
from process_kit import Run, hear_out, join, kill_at_random
from scenario_kit import (
    BAD,
    SCENARIOS,
    TOGETHER,
    RepairTrial,
    Scenario,
    Trial,
    encode_scenario,
    make_sources,
)

from cogcache.cache.backend import BACKENDS
from cogcache.cache.format import BackendName
from cogcache.cache.reader import CacheReader

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

EVERY_STEP, AT_ANY_TIME, ONE_OF_THREE, GROWING, REPAIRS = 60, 100, 60, 60, 60
"""The least number of kills in each test, of each scenario or backend; in the second, of each process."""

SEVERAL = len(TOGETHER) * (3 * AT_ANY_TIME + ONE_OF_THREE)
"""Kills while three processes encode into one cache."""
assert SEVERAL >= 200


def of_each(scenarios: list[Scenario]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("scenario", scenarios, ids=lambda scenario: scenario.name)


both = pytest.mark.parametrize("kind", BACKENDS)


@pytest.fixture(scope="module")
def tally(request: pytest.FixtureRequest) -> Iterator[Tally]:
    """Counts the kills of all tests, and prints them at the end."""
    known = Tally()
    yield known
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print("", *known.lines(), sep="\n")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Finished caches to export and merge from, by backend. Read only."""
    return make_sources(tmp_path_factory.mktemp("source"))


@contextmanager
def timed(tally: Tally, name: str) -> Iterator[None]:
    began = time.monotonic()
    yield
    tally.seconds[name] = time.monotonic() - began


@of_each(SCENARIOS)
def test_killed_before_every_file_operation(
    scenario: Scenario,
    processes: ForkServerContext,
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tally: Tally,
) -> None:
    trial, name = Trial(scenario, source, tmp_path, monkeypatch), f"{scenario.name}: before every operation"
    with timed(tally, name):
        for step in range(trial.steps):
            root = trial.begin()
            (run,) = runs = trial.launch(processes, root, step)
            told = join(runs)
            assert run.killed
            kept = check_after_kill(root, trial.before, told, trial.finished)
            tally.add(name, root, step / trial.steps)
            trial.finish(root, kept)
    tally.check(name, EVERY_STEP)
    assert tally.moments[name] == {
        "shard renamed, no index yet",
        "index there, plan not removed",
        "tables waiting beside the manifest",
        *([] if trial.finished else ["tables waiting"]),
    }


@of_each([*SCENARIOS, *TOGETHER])
def test_killed_at_any_time(
    scenario: Scenario,
    processes: ForkServerContext,
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tally: Tally,
) -> None:
    """The same cache is killed, by all who work on it together, again and again until it is finished."""
    trial, name = Trial(scenario, source, tmp_path, monkeypatch), f"{scenario.name}: at any time"
    dice, least = random.Random(name), AT_ANY_TIME * scenario.processes
    with timed(tally, name):
        while tally.kills[name] < least:
            root, killed, kept = trial.begin(), 1, trial.before
            while killed:
                runs = trial.launch(processes, root)
                kill_at_random(runs, runs, trial.steps, dice)
                told, killed = join(runs), sum(run.killed for run in runs)
                assert kept.keys.isdisjoint(told)
                kept = check_after_kill(root, kept, told, trial.finished)
                if killed:
                    tally.add(name, root, trial.progress(kept.keys), killed)
            assert snapshot(root) == trial.expected
    tally.check(name, least)


@of_each(TOGETHER)
def test_one_of_three_processes_is_killed(
    scenario: Scenario,
    processes: ForkServerContext,
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tally: Tally,
) -> None:
    """The two others finish its work."""
    trial, name = Trial(scenario, source, tmp_path, monkeypatch), f"{scenario.name}: one is killed"
    dice = random.Random(name)
    with timed(tally, name):
        while tally.kills[name] < ONE_OF_THREE:
            root, itself = trial.begin(), dice.random() < 0.5
            stop = dice.randrange(trial.steps // 2) if itself else None
            runs = victim, *others = trial.launch(processes, root, stop)
            if not itself:
                kill_at_random(runs, [victim], trial.steps, dice)
            hear_out([victim], runs)
            by_then = [key for run in runs for key in run.told]
            told = join(runs)
            assert not any(run.killed for run in others)
            if victim.killed:
                tally.add(name, root, trial.progress(by_then))
            kept = check_after_kill(root, trial.before, told, finished=True)
            assert kept.keys == trial.keys
            trial.finish(root, kept)
    tally.check(name, ONE_OF_THREE)


def test_lists_grow_while_nothing_is_finished(
    processes: ForkServerContext, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tally: Tally
) -> None:
    """Every run is given more clips than the last, which was killed. Shards differ then, but nothing else does."""
    name, dice, most = "encode, lists that grow", random.Random(0), 8
    trial = Trial(encode_scenario(name, Lists(most, bad=BAD)), source, tmp_path, monkeypatch)
    whole = trial.begin()
    encoding(Lists(most, bad=BAD))(whole, str)
    with timed(tally, name):
        while tally.kills[name] < GROWING:
            root, kept = trial.begin(), trial.before
            for clips in range(2, most + 1):
                body = encoding(Lists(clips, bad=BAD))
                run = Run(processes, body, root, dice.randrange(trial.steps), torn=True)
                told = join([run])
                assert kept.keys.isdisjoint(told)
                kept = check_after_kill(root, kept, told, finished=False)
                if run.killed:
                    tally.add(name, root, trial.progress(kept.keys))
            made: list[str] = []
            encoding(Lists(most, bad=BAD))(root, made.append)
            assert kept.keys.isdisjoint(made)
            check_after_kill(root, kept, frozenset(made), finished=True)
            assert contents(root) == contents(whole)
            shutil.rmtree(root)
    tally.check(name, GROWING)


def contents(root: Path) -> dict[str, object]:
    """Tables and entries of a cache, wherever in it they are."""
    reader = CacheReader(root)
    entries = {
        key: reader.contents(name, key) for name in reader.manifest.series for key in reader.keys(name)
    }
    return {**entries, "samples": reader.samples, "failures": reader.failures, "prompts": reader.validation}


@both
def test_repair_is_killed_before_every_file_operation(
    kind: BackendName,
    processes: ForkServerContext,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tally: Tally,
) -> None:
    """No good entry is lost; the next repair, and the next encode, end as if nothing had been."""
    trial, name = RepairTrial(kind, tmp_path, monkeypatch), f"{kind}: repair: before every operation"
    with timed(tally, name):
        for step in range(trial.steps):
            root = Path(shutil.copytree(trial.start, tmp_path / str(step)))
            run = Run(processes, trial.body, root, step, torn=bool(step % 2))
            assert not join([run])
            assert run.killed
            kept = trial.check(root)
            tally.add(name, root, step / trial.steps)
            trial.finish(root, kept)
    tally.check(name, REPAIRS)
