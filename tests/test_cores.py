"""How many threads read videos where nobody says."""

from __future__ import annotations

from pathlib import Path

import pytest

from cogcache import cores
from cogcache.config import EncodeConfig


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """One of 16 cores without a quota."""
    monkeypatch.setattr(cores.os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    monkeypatch.setattr(cores, "_QUOTA", tmp_path / "cpu.max")
    return monkeypatch


@pytest.mark.parametrize(
    ("quota", "cores_there"),
    [
        ("max 100000", 16),
        ("400000 100000", 4),
        ("250000 100000", 3),
        ("50000 100000", 1),
        ("9900000 100000", 16),
    ],
)
@pytest.mark.usefixtures("machine")
def test_a_container_gets_what_its_quota_says(quota: str, cores_there: int, tmp_path: Path) -> None:
    assert cores.usable_cores() == 16  # no such file
    (tmp_path / "cpu.max").write_text(quota + "\n")
    assert cores.usable_cores() == cores_there


@pytest.mark.parametrize(("there", "threads"), [(1, 2), (2, 2), (4, 3), (9, 8), (64, 8)])
def test_one_core_is_left_and_never_fewer_than_two_threads_read(
    machine: pytest.MonkeyPatch, there: int, threads: int
) -> None:
    machine.setattr(cores.os, "sched_getaffinity", lambda _: set(range(there)), raising=False)
    wanted = EncodeConfig(data_root=Path("x"), model="a/b").workers
    assert wanted is None
    assert cores.reading_threads(wanted) == threads
    assert cores.reading_threads(20) == 20
