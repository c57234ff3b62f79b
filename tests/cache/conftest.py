"""Fixtures of the cache tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from cache_kit import FakeOs, encode, install, snapshot


@pytest.fixture
def fast_disk(monkeypatch: pytest.MonkeyPatch) -> FakeOs:
    """Writes go to the page cache only: for tests that make thousands of them and cut no power."""
    return install(FakeOs(), monkeypatch)


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished cache that nothing disturbed. Read only: copy it before changing it."""
    root = tmp_path_factory.mktemp("undisturbed") / "cache"
    assert encode(root) is not None
    return root


@pytest.fixture(scope="session")
def expected(undisturbed: Path) -> dict[str, bytes]:
    """Bytes of every file of that cache."""
    return snapshot(undisturbed)
