"""torch's allocators are set up for trainings that nearly fill a GPU, unless the user has set them."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from cogcache.allocator_settings import set_up_allocators

NAMES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)


def test_what_is_asked_for() -> None:
    set_up_allocators()
    assert {"expandable_segments:True", "pinned_use_cuda_host_register:True"} < {
        *os.environ[NAMES[0]].split(",")
    }
    assert NAMES[1] not in os.environ


@pytest.mark.parametrize("name", NAMES)
def test_a_users_settings_stay(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "max_split_size_mb:128")
    set_up_allocators()
    assert {key: os.environ.get(key) for key in NAMES} == dict.fromkeys(NAMES) | {
        name: "max_split_size_mb:128"
    }


def test_a_training_asks_before_torch_is_there() -> None:
    program = """
import os, sys

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print("seen", os.environ.get("PYTORCH_CUDA_ALLOC_CONF"))
            sys.meta_path.remove(self)

sys.meta_path.insert(0, Watch())
from cogcache.cli import run
run(["train", "--shards", "nowhere"])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert "seen expandable_segments:True" in done.stdout, done.stderr
