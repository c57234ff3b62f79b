"""Filling a series with entries that are all at hand, as measurements and tests have them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from cogcache.cache.format import Entry
from cogcache.cache.writer import CacheWriter

__all__ = ["fill_series"]


def fill_series(
    writer: CacheWriter,
    series: str,
    entries: Sequence[Entry],
    entries_per_shard: int,
    group: str = "",
    advance: Callable[[], object] = lambda: None,
) -> None:
    """Plan the entries in this order, and make all of them.

    Args:
        group: As :meth:`CacheWriter.plan` takes it.
        advance: Called after each entry.
    """
    by_key = {entry.key: entry for entry in entries}
    writer.plan(series, list(by_key), entries_per_shard, group)
    for job in writer.jobs(series, by_key.keys()):
        with job:
            for key in job.remaining:
                job.append(by_key[key])
                advance()
            job.finish()
