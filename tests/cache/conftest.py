"""Fixtures of the cache tests."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path

import cache_kit
import pytest
import verify_kit
from cache_kit import FakeOs, encode, install, snapshot

from cogcache.cache.format import BackendName

_LONG = ("test_stopped_before_every_single_step[zarr-False]", "test_every_single_step_fails[zarr-5-False]")
"""Run by: pytest -m slow tests/cache/test_cache_crash.py. The other half of both stays in the default run."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What is exhaustive for tar shards already is done for zarr's, too, but not every time."""
    for item in items:
        if item.name in _LONG:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def processes() -> ForkServerContext:
    """Processes that start warm: with torch, the cache and the kits imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["safetensors.torch", "process_kit", "scenario_kit"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # it knows of no other path
        forkserver.ensure_running()
    return context


@pytest.fixture
def fast_disk(monkeypatch: pytest.MonkeyPatch) -> FakeOs:
    """Writes go to the page cache only: for tests that make thousands of them and cut no power."""
    return install(FakeOs(), monkeypatch)


@pytest.fixture(scope="session", params=["webdataset", "zarr"])
def backend(request: pytest.FixtureRequest) -> BackendName:
    """Each backend in turn. The kits make caches of it in the tests that ask for it, and nowhere else."""
    name: BackendName = request.param
    return name


@contextmanager
def made_as(backend: BackendName) -> Iterator[None]:
    """The kits make caches of this backend: for fixtures that outlive a test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache_kit, "BACKEND", backend)
        yield


@pytest.fixture(autouse=True)
def _backend_of_this_test(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests that do not ask for ``backend`` are about tar shards, or about what is the same for all."""
    name = request.getfixturevalue("backend") if "backend" in request.fixturenames else "webdataset"
    monkeypatch.setattr(cache_kit, "BACKEND", name)


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, backend: BackendName) -> Path:
    """A finished cache that nothing disturbed. Read only: copy it before changing it."""
    root = tmp_path_factory.mktemp("undisturbed") / "cache"
    with made_as(backend):
        assert encode(root) is not None
    return root


@pytest.fixture(scope="session")
def expected(undisturbed: Path) -> dict[str, bytes]:
    """Bytes of every file of that cache."""
    return snapshot(undisturbed)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, backend: BackendName) -> Path:
    """A finished cache. Read only."""
    root = tmp_path_factory.mktemp("finished") / "cache"
    with made_as(backend):
        verify_kit.encode(root)
    return root


@pytest.fixture
def root(finished: Path, tmp_path: Path, fast_disk: FakeOs) -> Path:
    """A copy of the finished cache, to be damaged."""
    assert fast_disk
    return Path(shutil.copytree(finished, tmp_path / "cache"))
