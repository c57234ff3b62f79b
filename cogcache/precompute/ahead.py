"""Threads ahead of the encoder: they claim shards and read files for their entries."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic
from weakref import WeakSet

from cogcache.cache.writer import CacheWriter, ShardJob
from cogcache.precompute.piece import Model, Piece, Raw

__all__ = ["Step", "read_ahead"]

_MORE = 4
"""Files read beyond one for each thread, so that threads are not held up by a slow file at the front."""


@dataclass(frozen=True)
class Step(Generic[Model, Raw]):
    """The next thing to do for a shard: make an entry of what is read, or, with neither, finish it.

    ``fresh`` where no step before shares the read, and for a shard that is only to be finished.
    """

    job: ShardJob
    made: tuple[Piece[Model, Raw], Future[Raw]] | None = None
    fresh: bool = True


def read_ahead(
    writer: CacheWriter,
    series: str,
    pieces: Mapping[str, Piece[Model, Raw]],
    workers: int,
    claims: WeakSet[ShardJob],
) -> Generator[Step[Model, Raw], None, None]:
    """All that is to be done for a series, in order, across the borders of shards and of groups of clips.

    Every shard that is claimed is added to ``claims``.

    At most ``workers + 4`` files are in memory that were read and not yet taken.
    """
    with ThreadPoolExecutor(workers, thread_name_prefix="read") as pool:
        ahead: deque[Step[Model, Raw]] = deque()
        steps = _claimed(writer, series, pieces, pool, claims)
        fresh = 0
        try:
            while True:
                while fresh < workers + _MORE and (step := next(steps, None)) is not None:
                    ahead.append(step)
                    fresh += step.fresh
                if not ahead:
                    return
                step = ahead.popleft()
                fresh -= step.fresh
                yield step
        finally:
            steps.close()
            pool.shutdown(wait=False, cancel_futures=True)


def _claimed(
    writer: CacheWriter,
    series: str,
    pieces: Mapping[str, Piece[Model, Raw]],
    pool: ThreadPoolExecutor,
    claims: WeakSet[ShardJob],
) -> Generator[Step[Model, Raw], None, None]:
    for job in writer.jobs(series, pieces.keys()):
        claims.add(job)
        last_id, last_read = "", None
        for key in job.remaining:
            piece = pieces[key]
            fresh = last_read is None or piece.raw_id != last_id
            if last_read is None or fresh:
                last_id, last_read = piece.raw_id, pool.submit(piece.read)
            yield Step(job, (piece, last_read), fresh)
        yield Step(job, fresh=not job.remaining)
