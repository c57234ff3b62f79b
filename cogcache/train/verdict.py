"""What a run's steps spent their time on, in a plain line, and one more where data was waited for."""

from __future__ import annotations

from cogcache.config import TrainConfig
from cogcache.location import Url
from cogcache.train.clock import PHASES, StepTimes

__all__ = ["Tally"]

_MATTERS = 0.05
"""Share of the time from which on waiting for data is worth a word."""


class Tally:
    """Adds up the steps of a run.

    Args:
        ceiling: Operations a second that the device reaches in matrix products; None if that was not measured.
    """

    def __init__(self, config: TrainConfig, ceiling: float | None) -> None:
        self._config, self._ceiling = config, ceiling
        self._times, self._flops = StepTimes(), 0

    def add(self, times: StepTimes, flops: int) -> None:
        """Count a step in."""
        self._times.add(times)
        self._flops += flops

    def verdict(self, peak: int | None) -> list[str]:
        """A line, and one more where waiting for data matters; none if no step was counted.

        Args:
            peak: Bytes of GPU memory at the peak; None without a GPU.
        """
        if not self._times.total:
            return []
        shares = self._times.shares()
        parts = ", ".join(f"{phase} {shares[phase]:.0%}" for phase in PHASES)
        memory = "" if peak is None else f" Peak: {peak / 2**30:.2f} GiB of GPU memory."
        lines = [f"Where the time went: {parts}. {self._speed()}.{memory}"]
        if shares["data"] > _MATTERS:
            lines.append(f"Data was waited for {shares['data']:.0%} of the time: {self._advice()}.")
        return lines

    def _advice(self) -> str:
        more = f"raise --workers (now {self._config.workers})"
        if isinstance(self._config.shards, Url):
            return f"{more} or --remote-cache-size, or copy the shards to a local disk"
        return f"{more}, or put the shards on a faster disk"

    def _speed(self) -> str:
        rate = self._flops / self._times.total
        if self._ceiling is None:
            return f"{rate / 1e12:.3g} TFLOP/s"
        share = rate / self._ceiling
        return f"{rate / 1e12:.0f} TFLOP/s, {share:.0%} of the {self._ceiling / 1e12:.0f} that products alone reach"
