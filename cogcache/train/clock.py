"""Where the time of a step goes, without waiting for the device to find out.

On a GPU marks are events in the stream, read when the step has long passed: the times are the device's own, gaps in
which it had nothing to do included. On a CPU they are readings of a clock.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import torch

__all__ = ["PHASES", "StepClock", "StepTimes"]

PHASES = ("data", "forward", "backward", "optimizer", "other")
"""``data``: waiting for samples to be read; ``optimizer``: exchange of losses, clipping and update; ``other``: between
steps, all the rest."""


@dataclass
class StepTimes:
    """Seconds of one step, by phase, from the end of the step before to its own end."""

    phases: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))

    @property
    def total(self) -> float:
        """The whole step."""
        return sum(self.phases.values())

    def add(self, other: StepTimes) -> None:
        """Count another step's times in."""
        for phase, seconds in other.phases.items():
            self.phases[phase] += seconds

    def shares(self) -> dict[str, float]:
        """Part of the whole, by phase; nothing took nothing."""
        return {phase: seconds / (self.total or 1.0) for phase, seconds in self.phases.items()}


class StepClock:
    """Marks phases as they are given to the device: :meth:`lap` after each, :meth:`finish` after the step."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._laps: list[tuple[str, Any, float]] = []
        self._last = self._mark()

    def restart(self) -> None:
        """Leave out what happened since the last lap."""
        self._last = self._mark()

    def lap(self, phase: str, at_most: float | None = None) -> None:
        """What happened since the last mark was ``phase``.

        Args:
            at_most: Seconds; what the gap is longer counts as ``other``.
        """
        before, self._last = self._last, self._mark()
        self._laps.append((phase, (before, self._last), float("inf") if at_most is None else at_most))

    def finish(self) -> Callable[[], StepTimes]:
        """End the step. What is returned tells its times, once the device has come to its end."""
        laps, self._laps = self._laps, []

        def times() -> StepTimes:
            result = StepTimes()
            for phase, (start, end), limit in laps:
                seconds = self._between(start, end)
                result.phases[phase] += min(seconds, limit)
                result.phases["other"] += max(seconds - limit, 0.0)
            return result

        return times

    def _mark(self) -> Any:
        if self._device.type != "cuda":
            return perf_counter()
        make: Any = torch.cuda.Event
        event = make(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _between(self, start: Any, end: Any) -> float:
        if self._device.type != "cuda":
            return float(end - start)
        return float(start.elapsed_time(end)) / 1000
