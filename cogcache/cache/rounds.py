"""Filling a cache in rounds: what a process that was killed held is taken over by those that work beside it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

from cogcache.cache.writer import CacheWriter

__all__ = ["fill_in_rounds"]

_ROUNDS = 100
"""Each further one needs another process that was killed between our passing its shard and the end of our round."""


def fill_in_rounds(
    writer: CacheWriter,
    wanted: Mapping[str, Collection[str]],
    fill: Callable[[Collection[str]], object],
) -> bool:
    """Fill series until no shard is left that awaits entries of ours and that nobody holds. Waits for nobody.

    Args:
        wanted: Series -> all keys that this run can make, done or not; all are planned.
        fill: Does all :meth:`CacheWriter.jobs` of the series given: first every one, then those with such shards.

    Returns:
        Whether all is done, so that the cache can be committed; False while other processes fill shards.
    """
    series: Collection[str] = wanted.keys()
    for _ in range(_ROUNDS):
        fill(series)
        left = writer.left(wanted)
        if not left.free:
            return not left.busy
        series = left.free
    return False
