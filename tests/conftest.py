"""Fixtures that several test modules share."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from cogcache.tiny import Family, build_tiny_model


@pytest.fixture(scope="session", autouse=True)
def _own_hash_memory(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Tests, and the processes they start, leave the user's cache folder alone."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache-home"))


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Family], Path]:
    """Folder of the tiny model of a family, built once a session. Read only: copy it before changing it."""
    root = tmp_path_factory.mktemp("tiny-models")

    def model(family: Family) -> Path:
        folder = root / family
        return folder if folder.exists() else build_tiny_model(folder, family)

    return model


@pytest.fixture(scope="session")
def mixed_videos() -> Path:
    """The folder of difficult videos beside the repository; tests that need it skip without it."""
    folder = Path(__file__).parents[2] / "shared" / "videos" / "mixed"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    return folder
