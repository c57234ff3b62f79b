"""How entries are made: reading runs in threads ahead of the encoder, writing in one thread behind it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from types import TracebackType
from typing import Any, Generic, TypeVar

from cogcache.cache.format import TEXT, Entry
from cogcache.cache.writer import CacheWriter, ShardJob
from cogcache.errors import ModelError, VideoError
from cogcache.precompute.text import FrozenText
from cogcache.progress import Progress

__all__ = ["Piece", "Tally", "encode_pieces", "encode_text"]

_WRITES_BEHIND = 4
_NOT_FINITE = "the text encoder gave values that are not finite; try --text-dtype float32"

Model = TypeVar("Model")
Raw = TypeVar("Raw")


@dataclass(frozen=True)
class Piece(Generic[Model, Raw]):
    """One entry to be made.

    Attributes:
        key: Its key.
        source: The file it comes from, for the failure ledger.
        group: Shape that it shares with all entries of its shard: ``49x480x720``.
        raw_id: Neighbours with the same one share a single ``read``.
        read: Runs in a thread; raises :class:`VideoError` if the file cannot be used.
        encode: Runs on the device; raises :class:`VideoError` if the result is of no use.
    """

    key: str
    source: str
    group: str
    raw_id: str
    read: Callable[[], Raw]
    encode: Callable[[Model, Raw], Entry]


@dataclass
class Tally:
    """What a stage did; ``waited_s`` is how long the encoder waited for reads."""

    encoded: int = 0
    failed: int = 0
    waited_s: float = 0.0

    def add(self, other: Tally) -> None:
        """Count another stage's work, too."""
        self.encoded += other.encoded
        self.failed += other.failed
        self.waited_s += other.waited_s


class _Behind:
    """Runs writes in order in one thread, a few behind the encoder; the first error stops the run."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="write")
        self._pending: deque[Future[None]] = deque()

    def __enter__(self) -> _Behind:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=kind is not None)
        if kind is None:
            self._settle(0)

    def do(self, write: Callable[..., None], *args: Any) -> None:
        self._pending.append(self._pool.submit(write, *args))
        self._settle(_WRITES_BEHIND)

    def _settle(self, allowed: int) -> None:
        while len(self._pending) > allowed:
            self._pending.popleft().result()


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
    tally = Tally()
    by_key = {piece.key: piece for piece in reversed(pieces)}
    todo = len(by_key.keys() - writer.committed(series))
    model = cache(load_model)
    with ExitStack() as stack:
        progress = stack.enter_context(Progress(unit, todo, unit)) if todo else None
        behind = stack.enter_context(_Behind())
        started = time.monotonic()
        for job, piece, raw in _read_ahead(writer, series, by_key, workers, behind):
            _encode_piece(job, piece, raw, model, behind, tally)
            share = tally.waited_s / max(time.monotonic() - started, 1e-9)
            if progress:
                progress.advance(waiting_for_files=f"{share:.0%}", failed=tally.failed)
    return tally


def _encode_piece(
    job: ShardJob,
    piece: Piece[Model, Raw],
    raw: Future[Raw],
    model: Callable[[], Model],
    behind: _Behind,
    tally: Tally,
) -> None:
    loaded = model()
    waiting = time.monotonic()
    try:
        content = raw.result()
        tally.waited_s += time.monotonic() - waiting
        entry = piece.encode(loaded, content)
    except (VideoError, MemoryError) as error:
        reason = error.message if isinstance(error, VideoError) else "not enough memory to read it"
        behind.do(job.fail, piece.key, piece.source, reason)
        tally.failed += 1
    else:
        behind.do(job.append, entry)
        tally.encoded += 1


def _read_ahead(
    writer: CacheWriter,
    series: str,
    pieces: Mapping[str, Piece[Model, Raw]],
    workers: int,
    behind: _Behind,
) -> Iterator[tuple[ShardJob, Piece[Model, Raw], Future[Raw]]]:
    """Claim shards and read for their entries in threads, a few ahead; finish each shard after its last entry."""
    with ThreadPoolExecutor(workers, thread_name_prefix="read") as pool:
        ahead: deque[tuple[ShardJob, tuple[Piece[Model, Raw], Future[Raw]] | None]] = deque()
        steps = _claimed(writer, series, pieces, pool)
        try:
            while True:
                while len(ahead) <= workers and (step := next(steps, None)) is not None:
                    ahead.append(step)
                if not ahead:
                    return
                job, reading = ahead.popleft()
                if reading is None:
                    behind.do(job.finish)
                else:
                    yield job, *reading
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _claimed(
    writer: CacheWriter, series: str, pieces: Mapping[str, Piece[Model, Raw]], pool: ThreadPoolExecutor
) -> Iterator[tuple[ShardJob, tuple[Piece[Model, Raw], Future[Raw]] | None]]:
    """The entries to make, their reads begun; ``None`` after the last of each shard."""
    for job in writer.jobs(series, pieces.keys()):
        last_id, last_read = "", None
        for key in job.remaining:
            piece = pieces[key]
            if last_read is None or piece.raw_id != last_id:
                last_id, last_read = piece.raw_id, pool.submit(piece.read)
            yield job, (piece, last_read)
        yield job, None


def encode_text(
    writer: CacheWriter, captions: Mapping[str, str], load_text: Callable[[], FrozenText], batch_size: int
) -> Tally:
    """Encode every caption whose embedding is planned and not yet there, and commit its shards.

    Args:
        captions: Text key to caption.
        load_text: Called once, and only if there is work.
        batch_size: Captions encoded at once.
    """
    tally = Tally()
    todo = len(captions.keys() - writer.committed(TEXT))
    encoder = cache(load_text)
    with ExitStack() as stack:
        progress = stack.enter_context(Progress("captions", todo, "captions")) if todo else None
        for job in writer.jobs(TEXT, captions.keys()):
            # Batches are cut from the shard's whole plan, so that a resumed run forms the same ones: a row's last
            # bits may depend on the shape of its batch.
            for batch in _batches(job.planned, batch_size):
                missing = [key for key in batch if key in job.remaining]
                if missing:
                    texts = [captions.get(key, "") for key in batch]
                    failed = _encode_batch(job, encoder(), texts, batch, missing)
                    tally.failed += failed
                    tally.encoded += len(missing) - failed
                    if progress:
                        progress.advance(len(missing), failed=tally.failed)
            job.finish()
    return tally


def _batches(keys: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    return (keys[start : start + size] for start in range(0, len(keys), size))


def _encode_batch(
    job: ShardJob,
    encoder: FrozenText,
    captions: Sequence[str],
    keys: Sequence[str],
    missing: Sequence[str],
) -> int:
    """Encode a batch and append what is missing; how many of those are of no use.

    Raises:
        ModelError: if even the empty caption is: then no training could use the cache.
    """
    embeddings = encoder.encode(captions)
    failed = 0
    for key, caption, embedding in zip(keys, captions, embeddings, strict=True):
        if key not in missing:
            continue
        if embedding.isfinite().all():
            job.append(Entry(key, {"prompt_embeds": embedding.clone()}, {"caption": caption}))
        elif caption:
            job.fail(key, caption[:200], _NOT_FINITE)
            failed += 1
        else:
            raise ModelError(f"{_NOT_FINITE.partition(';')[0]}.", "Try --text-dtype float32.")
    return failed
