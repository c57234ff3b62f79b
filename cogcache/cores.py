"""How many processor cores this process may use."""

from __future__ import annotations

import math
import os
from pathlib import Path

__all__ = ["reading_threads", "usable_cores"]

_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def usable_cores() -> int:
    """Cores that the scheduler gives this process: by affinity, and by the quota of its container (cgroup v2)."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(allowed, _quota()))


def _quota() -> int:
    """Cores of the quota, rounded up; a very large number where there is none."""
    try:
        limit, period = _QUOTA.read_text("utf-8").split()
        return math.ceil(int(limit) / int(period))
    except (OSError, ValueError, ZeroDivisionError):  # no such file, "max", or another form
        return 1 << 30


def reading_threads(wanted: int | None) -> int:
    """``--workers``: as wanted, else one less than the cores, from 2 to 8.

    One core is left for the thread that feeds the GPU. More than 8 threads wait for each other in Python.
    """
    return wanted or min(8, max(2, usable_cores() - 1))
