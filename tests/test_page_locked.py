"""Page-locked memory is filled in several threads, unless the user has set torch's allocator."""

from __future__ import annotations

import os

import pytest

from cogcache.page_locked import lock_pages_in_threads

NAMES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)


def test_threads_are_asked_for() -> None:
    lock_pages_in_threads()
    assert "pinned_use_cuda_host_register:True" in os.environ[NAMES[0]]
    assert NAMES[1] not in os.environ


@pytest.mark.parametrize("name", NAMES)
def test_a_users_settings_stay(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "expandable_segments:True")
    lock_pages_in_threads()
    assert {key: os.environ.get(key) for key in NAMES} == dict.fromkeys(NAMES) | {
        name: "expandable_segments:True"
    }
