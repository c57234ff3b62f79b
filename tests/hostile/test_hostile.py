"""Hostile input: whatever a file says, reading it works or ends in one of our errors, and nothing else happens.

Some thousand cases by default; ``pytest -m slow tests/hostile`` runs over a hundred thousand and prints how they ended.
"""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import pytest
from hostile_cache import cache_targets
from hostile_files import files_targets
from hostile_kit import Target, run_cases
from hostile_remote import remote_targets
from hostile_runs import run_targets
from hostile_server import serving
from hostile_videos import make_videos, run_videos
from hostile_zarr import ZarrBox, zarr_targets

from cogcache.errors import CacheError, CogcacheError

pytestmark = pytest.mark.filterwarnings(
    "ignore"
)  # Pillow and diffusers warn of much, and the cases are to go on

COUNTS = {  # by default, and of the slow run
    "manifest": (25, 1200),
    "identity": (25, 800),
    "tables": (25, 1200),
    "index": (25, 1200),
    "archive": (15, 500),
    "entry": (20, 1000),
    "plans": (20, 800),
    "damaged_pair": (8, 300),
    "journal": (60, 4000),
    "safetensors": (1500, 60_000),
    "lists": (80, 3000),
    "lora": (200, 8000),
    "settings": (25, 600),
    "model": (60, 3000),
    "pictures": (300, 6000),
    "zarr_json": (12, 700),
    "zarr_slots": (12, 700),
    "zarr_entry": (15, 700),
    "zarr_plans": (12, 500),
    "zarr_chunks": (1000, 60_000),
    "zarr_index": (12, 400),
    "checkpoint": (80, 3000),
    "inspect": (25, 800),
    "server": (30, 1000),
    "local_cache": (20, 800),
}
VIDEOS = (30, 1500)
FIRST_OF_MANY = 1_000_000


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """A folder in memory where there is such a place: a case writes some ten files."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as name:
        yield Path(name)


@pytest.fixture(scope="module")
def targets(folder: Path) -> Iterator[dict[str, Target]]:
    for name in ("caches", "files", "zarr"):
        (folder / name).mkdir()
    served = ZarrBox(folder / "served")
    with serving(served.lay_out(served.files)) as port:
        made = [
            *cache_targets(folder / "caches"),
            *files_targets(folder / "files"),
            *zarr_targets(folder / "zarr"),
            *run_targets(folder / "runs"),
            *remote_targets(served, folder / "remote", port),
        ]
        yield {target.name: target for target in made}


@pytest.fixture(scope="module")
def videos(folder: Path) -> Path:
    (folder / "videos").mkdir()
    return make_videos(folder / "videos")


@pytest.mark.parametrize("name", COUNTS)
def test_every_case_is_read_or_refused(name: str, targets: dict[str, Target]) -> None:
    outcome = run_cases(targets[name], COUNTS[name][0])
    assert outcome.findings == []
    assert outcome.cases == outcome.accepted + outcome.refused == COUNTS[name][0]
    assert outcome.accepted


def test_every_video_is_read_or_refused(videos: Path) -> None:
    outcome = run_videos(videos, VIDEOS[0])
    assert outcome.findings == []
    assert outcome.cases == VIDEOS[0]
    assert outcome.accepted
    assert outcome.refused


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_a_hundred_thousand_cases(
    targets: dict[str, Target], videos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outcomes = []
    for name, (_, count) in COUNTS.items():
        outcomes.append(run_cases(targets[name], count, FIRST_OF_MANY))
        with capsys.disabled():
            print(f"\n{outcomes[-1]}", end="", flush=True)
    outcomes.append(run_videos(videos, VIDEOS[1], FIRST_OF_MANY))
    total = sum(outcome.cases for outcome in outcomes)
    with capsys.disabled():
        print(f"\n{outcomes[-1]}\ntotal: {total} cases")
    assert [finding for outcome in outcomes for finding in outcome.findings] == []
    assert total >= 100_000


def opens_outside(_: Random) -> None:
    Path("/etc/hostname").read_bytes()


def writes_outside(_: Random) -> None:
    Path(tempfile.gettempdir(), "hostile-test").mkdir(exist_ok=True)


def unpickles(_: Random) -> None:
    pickle.loads(pickle.dumps(Path))  # noqa: S301


def starts_a_program(_: Random) -> None:
    subprocess.run(["true"], check=True)


def takes_memory(_: Random) -> None:
    bytearray(1 << 33)


def hangs(_: Random) -> None:
    while True:
        pass


def breaks(_: Random) -> None:
    raise KeyError("x")


def says_nothing(_: Random) -> None:
    raise CacheError("")


@pytest.mark.parametrize(
    ("case", "told"),
    [
        (opens_outside, "open '/etc/hostname'"),
        (writes_outside, "os.mkdir"),
        (unpickles, "pickle.find_class"),
        (starts_a_program, "subprocess.Popen"),
        (takes_memory, "MemoryError"),
        (hangs, "HangError"),
        (breaks, "KeyError"),
        (says_nothing, "CacheError without a text"),
    ],
)
def test_the_kit_finds_what_must_not_happen(
    case: Callable[[Random], None], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hostile_guard.CPU_SECONDS", 0.2)
    outcome = run_cases(Target("bad", case, (tmp_path,)), 1)
    assert any(told in finding for finding in outcome.findings)


def test_the_kit_takes_what_may_happen(tmp_path: Path) -> None:
    def works(random: Random) -> None:
        (tmp_path / "x").write_bytes(b"x")
        if random.random() < 0.5:
            raise CogcacheError("wrong")

    outcome = run_cases(Target("good", works, (tmp_path,)), 20)
    assert outcome.findings == []
    assert outcome.accepted + outcome.refused == 20
    shutil.rmtree(tmp_path / "x", ignore_errors=True)
