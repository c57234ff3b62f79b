"""How entries are made: files are read in threads ahead of the encoder, results written in one behind it.

The thread of :func:`encode_pieces` only hands work to the device: it begins the next clip before the last one's
result is there, so the device need not wait while results are read, checked, packed and written.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, closing
from functools import cache
from weakref import WeakSet

from cogcache.cache.format import Entry
from cogcache.cache.writer import CacheWriter, ShardJob
from cogcache.errors import VideoError
from cogcache.precompute.ahead import read_ahead
from cogcache.precompute.behind import Behind
from cogcache.precompute.piece import Model, Piece, Raw, Tally
from cogcache.progress import Progress

__all__ = ["RESULTS_WAITING", "Piece", "Tally", "encode_pieces"]

RESULTS_WAITING, _WRITES = 3, 8
"""So much may wait: results, so that the device has always work, and its memory holds few inputs more than it works on;
and writes, so that closing a shard holds nothing up.
"""


def encode_pieces(
    writer: CacheWriter,
    series: str,
    pieces: Sequence[Piece[Model, Raw]],
    load_model: Callable[[], Model],
    *,
    unit: str,
    workers: int,
) -> Tally:
    """Make every planned entry of ``series`` that is not there yet, and commit its shards.

    Args:
        pieces: All entries this run can make, done or not.
        load_model: Called once, and only if something is to be encoded.
        unit: What an entry is, in the plural, for the progress display.
        workers: Reading threads.
    """
    by_key = {piece.key: piece for piece in reversed(pieces)}
    todo = len(by_key.keys() - writer.committed(series))
    model = cache(load_model)
    with ExitStack() as stack:
        progress = stack.enter_context(Progress(unit, todo, unit)) if todo else None
        claims = WeakSet[ShardJob]()
        stack.callback(_give_back, claims)  # comes last, when nothing is written to them any more
        steps = stack.enter_context(closing(read_ahead(writer, series, by_key, workers, claims)))
        writes = stack.enter_context(Behind(_WRITES, "write"))
        making = _Making(stack.enter_context(Behind(RESULTS_WAITING, "result")), writes, progress)
        for step in steps:
            if step.made is None:
                making.finish(step.job)
            else:
                making.encode(step.job, *step.made, model)
    making.tally.seconds = making.elapsed()
    return making.tally


def _give_back(jobs: WeakSet[ShardJob]) -> None:
    """Close what an error has left open."""
    for job in list(jobs):
        job.close()


class _Making:
    """Begins entries in the caller's thread; has them finished in one behind it, written and counted in another.

    All that concerns shards passes through both in order.
    """

    def __init__(self, results: Behind, writes: Behind, progress: Progress | None) -> None:
        self.tally = Tally()
        self._results, self._writes, self._progress = results, writes, progress
        self._begun = self._done = 0
        self._started = self._idle_since = time.monotonic()

    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._started

    def encode(
        self, job: ShardJob, piece: Piece[Model, Raw], raw: Future[Raw], model: Callable[[], Model]
    ) -> None:
        """Begin an entry; a file that cannot be used is recorded as failed."""
        loaded = model()
        try:
            finish = piece.start(loaded, self._take(raw))
        except (VideoError, MemoryError) as error:
            self._results.do(self._writes.do, self._fail, job, piece, error)
        else:
            self._begun += 1
            self._results.do(self._result, job, piece, finish)

    def finish(self, job: ShardJob) -> None:
        """Commit a shard after all that was begun for it."""
        self._results.do(self._writes.do, job.finish)

    def _take(self, raw: Future[Raw]) -> Raw:
        """What was read. The wait for it counts from when the device has nothing left to do."""
        asked = time.monotonic()
        try:
            return raw.result()
        finally:
            if self._begun == self._done:
                self.tally.waited_s += time.monotonic() - max(asked, self._idle_since)

    def _result(self, job: ShardJob, piece: Piece[Model, Raw], finish: Callable[[], Entry]) -> None:
        try:
            entry = finish()
        except (VideoError, MemoryError) as error:
            self._writes.do(self._fail, job, piece, error)
        else:
            self._writes.do(self._write, job, entry)
        finally:
            self._idle_since = time.monotonic()
            self._done += 1

    def _write(self, job: ShardJob, entry: Entry) -> None:
        job.append(entry)
        self.tally.encoded += 1
        self._show()

    def _fail(self, job: ShardJob, piece: Piece[Model, Raw], error: VideoError | MemoryError) -> None:
        reason = error.message if isinstance(error, VideoError) else "not enough memory to read it"
        job.fail(piece.key, piece.source, reason)
        self.tally.failed += 1
        self._show()

    def _show(self) -> None:
        if self._progress:
            share = self.tally.waited_s / max(self.elapsed(), 1e-9)
            self._progress.advance(waiting_for_files=f"{share:.0%}", failed=self.tally.failed)
