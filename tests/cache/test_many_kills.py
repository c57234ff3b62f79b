"""Hundreds of real SIGKILLs. Run by: pytest -m slow tests/cache/test_many_kills.py, which prints how many."""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from multiprocessing.context import ForkServerContext
from pathlib import Path

import kill_kit
import pytest
from cache_kit import snapshot
from kill_kit import Lists, Tally, check_after_kill, encoding
from process_kit import Run
from scenario_kit import BAD, SCENARIOS, RepairTrial, Scenario, Trial, encode_scenario, make_sources

from cogcache.cache.backend import BACKENDS
from cogcache.cache.format import BackendName
from cogcache.cache.reader import CacheReader

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

EVERY_STEP, AT_ANY_TIME, ONE_OF_THREE, ALL_THREE, GROWING, REPAIRS = 60, 10, 30, 30, 30, 60
"""The least number of kills in each test: of each scenario in the first two, of each backend in the others."""


def _least() -> int:
    several = ONE_OF_THREE + ALL_THREE + REPAIRS
    return (EVERY_STEP + AT_ANY_TIME) * len(SCENARIOS) + several * len(BACKENDS) + GROWING


assert _least() >= 200
scenarios = pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
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


@scenarios
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
            outcome = Run(processes, trial.body, root, step, torn=bool(step % 2)).join()
            assert outcome.killed
            kept = check_after_kill(root, trial.before, outcome.told, trial.finished)
            tally.add(name, root, step / trial.steps)
            trial.finish(root, kept)
    tally.check(name, EVERY_STEP)
    assert tally.moments[name] == {
        "shard renamed, no index yet",
        "index there, plan not removed",
        "tables waiting beside the manifest",
        *([] if trial.finished else ["tables waiting"]),
    }


@scenarios
def test_killed_at_any_time(
    scenario: Scenario,
    processes: ForkServerContext,
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tally: Tally,
) -> None:
    """The same cache is killed again and again until it is finished."""
    trial, name = Trial(scenario, source, tmp_path, monkeypatch), f"{scenario.name}: at any time"
    usual, dice = Run(processes, trial.body, trial.begin()).join().seconds, random.Random(name)
    with timed(tally, name):
        while tally.kills[name] < AT_ANY_TIME or not spread(tally, name):
            root, killed, kept = trial.begin(), True, trial.before
            while killed:
                run = Run(processes, trial.body, root)
                time.sleep(dice.uniform(0, usual))
                run.kill()
                outcome = run.join()
                assert kept.keys.isdisjoint(outcome.told)
                killed, kept = outcome.killed, check_after_kill(root, kept, outcome.told, trial.finished)
                if killed:
                    tally.add(name, root, trial.progress(kept))
            assert snapshot(root) == trial.expected
    tally.check(name, AT_ANY_TIME)


def spread(tally: Tally, name: str) -> bool:
    """Whether the kills came at varied progress; after so many it is no accident any more if not."""
    return tally.varied(name) or len(tally.progress[name]) > 200


THREE = Lists(8, per_shard=2, bad=BAD, draws=1, prompts=1)


@both
def test_one_of_three_processes_is_killed(
    kind: BackendName,
    processes: ForkServerContext,
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tally: Tally,
) -> None:
    """The two others finish its work: at a random moment, or right before one of its file operations."""
    name, dice, three = (
        f"{kind}: three processes, one is killed",
        random.Random(0),
        replace(THREE, backend=kind),
    )
    trial = Trial(encode_scenario(name, three), source, tmp_path, monkeypatch)
    body = partial(kill_kit.encode_until_idle, lists=three)
    usual = Run(processes, body, trial.begin()).join().seconds
    with timed(tally, name):
        while tally.kills[name] < ONE_OF_THREE or not several(tally, name):
            root, chosen, itself = trial.begin(), dice.randrange(3), tally.kills[name] % 2 == 0
            stops = [dice.randrange(trial.steps // 2) if itself and n == chosen else None for n in range(3)]
            runs = [Run(processes, body, root, stop, torn=dice.random() < 0.5) for stop in stops]
            if not itself:
                time.sleep(dice.uniform(0, usual))
                runs[chosen].kill()
            outcomes = [run.join() for run in runs]
            told = [key for outcome in outcomes for key in outcome.told]
            assert [n for n, outcome in enumerate(outcomes) if outcome.killed] in ([chosen], [])
            assert len(told) == len(set(told)), "an entry was made twice"
            if outcomes[chosen].killed:
                tally.add(name, root, len(outcomes[chosen].told) / len(trial.keys))
            kept = check_after_kill(root, trial.before, frozenset(told), finished=True)
            assert kept.keys == trial.keys
            trial.finish(root, kept)
    assert len(set(tally.progress[name])) >= 4


def several(tally: Tally, name: str) -> bool:
    """As :func:`spread`, where one process of several does not do all of the work."""
    return len(set(tally.progress[name])) >= 4 or len(tally.progress[name]) > 200


@both
def test_three_processes_are_killed_together(
    kind: BackendName,
    processes: ForkServerContext,
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tally: Tally,
) -> None:
    """Three new ones go on, until the cache is finished."""
    name, dice, three = (
        f"{kind}: three processes, all are killed",
        random.Random(0),
        replace(THREE, backend=kind),
    )
    trial = Trial(encode_scenario(name, three), source, tmp_path, monkeypatch)
    body = partial(kill_kit.encode_until_idle, lists=three)
    usual = Run(processes, body, trial.begin()).join().seconds
    with timed(tally, name):
        while tally.kills[name] < ALL_THREE or not spread(tally, name):
            root, killed, kept = trial.begin(), 3, trial.before
            while killed:
                runs = [Run(processes, body, root) for _ in range(3)]
                time.sleep(dice.uniform(0, usual / 2))
                for run in runs:
                    run.kill()
                outcomes = [run.join() for run in runs]
                told = [key for outcome in outcomes for key in outcome.told]
                assert len(told) == len(set(told)), "an entry was made twice"
                assert kept.keys.isdisjoint(told)
                killed = sum(outcome.killed for outcome in outcomes)
                kept = check_after_kill(root, kept, frozenset(told), trial.finished)
                if killed:
                    tally.add(name, root, trial.progress(kept), killed)
                    usual *= (
                        0.7 if trial.progress(kept) == 1 else 1.1
                    )  # the first run may have been slower, or quicker
            assert snapshot(root) == trial.expected
    tally.check(name, ALL_THREE)


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
                outcome = Run(processes, body, root, dice.randrange(trial.steps), torn=True).join()
                assert kept.keys.isdisjoint(outcome.told)
                kept = check_after_kill(root, kept, outcome.told, finished=False)
                if outcome.killed:
                    tally.add(name, root, trial.progress(kept))
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
            assert Run(processes, trial.body, root, step, torn=bool(step % 2)).join().killed
            kept = trial.check(root)
            tally.add(name, root, step / trial.steps)
            trial.finish(root, kept)
    tally.check(name, REPAIRS)
