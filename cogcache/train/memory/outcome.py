"""What a run took, beside what was expected of it."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import torch

from cogcache.train.memory.forecast import Forecast

__all__ = ["outcome", "typical_seconds"]

_WARM_UP = 2
"""Steps at the beginning that compile, or find their buffers."""


def outcome(forecast: Forecast, device: torch.device, seconds: float | None) -> str:
    """One line: the peak of GPU memory and a step's time, expected and measured.

    Args:
        seconds: A typical step as measured; None where there were too few.
    """
    peak, expected = torch.cuda.max_memory_allocated(device) / 2**30, forecast.memory.device / 2**30
    text = f"GPU memory at the peak: {peak:.2f} GiB, expected {expected:.2f} ({_off(expected, peak)})"
    if seconds and forecast.typical_s:
        text += f"; a step: {seconds:.3f} s, expected {forecast.typical_s:.3f} ({_off(forecast.typical_s, seconds)})"
    return text + "."


def _off(expected: float, measured: float) -> str:
    return f"{expected / measured - 1:+.1%}" if measured else "nothing measured"


def typical_seconds(metrics: Path, after: int) -> float | None:
    """The median of the seconds that ``metrics.jsonl`` has for the steps after ``after`` and some to warm up."""
    try:
        lines = [json.loads(line) for line in metrics.read_text("utf-8").splitlines()]
    except (OSError, ValueError):
        return None
    steps = [line for line in lines if "seconds" in line and line.get("step", 0) > after + _WARM_UP]
    return statistics.median(line["seconds"] for line in steps) if steps else None
