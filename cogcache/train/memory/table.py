"""What each memory tier takes, as a table of text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cogcache.train.memory.estimate import Need
from cogcache.train.memory.forecast import Forecast, host_parts, shortfall

__all__ = ["DEVICE_PARTS", "HOST_PARTS", "aligned", "tier_table"]

DEVICE_PARTS = {
    "frozen_weights": "frozen weights of the blocks",
    "others": "frozen weights elsewhere",
    "trained_weights": "trained weights",
    "gradients": "gradients",
    "optimizer_state": "optimizer state",
    "block_inputs": "block inputs kept",
    "attention_outputs": "attention outputs kept",
    "activations": "all activations kept",
    "working_set": "one block at work",
}
HOST_PARTS = {
    "frozen_weights": "frozen weights",
    "optimizer_state": "optimizer state",
    "block_inputs": "block inputs kept",
    "attention_outputs": "attention outputs kept",
    "checkpoint_copies": "copies of checkpoints",
}
"""Names, for people, of the parts of an :class:`~cogcache.train.memory.estimate.Estimate` and of
:func:`~cogcache.train.memory.forecast.host_parts`.
"""


def tier_table(forecasts: Sequence[Forecast], free: Need | None = None, *, times: bool = True) -> str:
    """A column for each tier: GiB by part, seconds a step, and whether it fits into what is free."""
    rows = [["GPU memory at the peak, GiB", *(forecast.tier for forecast in forecasts)]]
    rows += _parts(DEVICE_PARTS, [forecast.memory.device_parts for forecast in forecasts])
    rows.append(["  together", *(_gib(forecast.memory.device) for forecast in forecasts)])
    rows.append(["page-locked host memory, GiB", *("" for _ in forecasts)])
    host = [host_parts(forecast, free) for forecast in forecasts]
    rows += _parts(HOST_PARTS, host)
    rows.append(["  together", *(_gib(sum(parts.values())) for parts in host)])
    rows.append(
        ["host memory while loading, GiB", *(_gib(forecast.memory.loading) for forecast in forecasts)]
    )
    if times and any(forecast.mean_s for forecast in forecasts):
        rows.append(["seconds a step", *(_seconds(forecast.mean_s) for forecast in forecasts)])
    if free is not None:
        rows.append(["fits", *("no" if shortfall(one.memory, free) else "yes" for one in forecasts)])
    notes = [f"{one.tier}: host memory is short, so {one.given_up}." for one in forecasts if one.given_up]
    return "\n".join([aligned(rows), *notes])


def _parts(names: Mapping[str, str], tiers: Sequence[Mapping[str, int]]) -> list[list[str]]:
    used = {part: name for part, name in names.items() if any(tier[part] for tier in tiers)}
    return [[f"  {name}", *(_gib(tier[part]) for tier in tiers)] for part, name in used.items()]


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as they must be, the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *rest in rows:
        cells = [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
    return "\n".join(lines)


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f}" if size else "-"


def _seconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds:.2f}"
