"""How embeddings are made: batches of captions one after the other, results read and written in threads behind."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache

import torch

from cogcache.cache.format import TEXT, Entry
from cogcache.cache.writer import CacheWriter, ShardJob
from cogcache.errors import ModelError
from cogcache.precompute.behind import Behind
from cogcache.precompute.lane import Running
from cogcache.precompute.piece import Tally
from cogcache.precompute.text import FrozenText
from cogcache.progress import Progress

__all__ = ["encode_text"]

_RESULTS, _WRITES = 1, 2
"""So many batches may wait; one of 32 embeddings has 60 MB."""
_NOT_FINITE = "the text encoder gave values that are not finite; try --text-dtype float32"


@dataclass(frozen=True)
class _Batch:
    """Some of a shard's planned keys with their captions, and those of them that are missing."""

    job: ShardJob
    keys: Sequence[str]
    captions: Sequence[str]
    missing: frozenset[str]


def encode_text(
    writer: CacheWriter, captions: Mapping[str, str], load_text: Callable[[], FrozenText], batch_size: int
) -> Tally:
    """Encode every caption whose embedding is planned and not yet there, and commit its shards.

    Args:
        captions: Text key to caption.
        load_text: Called once, and only if there is work.
        batch_size: Captions encoded at once.

    Raises:
        ModelError: if even the embedding of the empty caption is not finite: then no training could use the cache.
    """
    todo = len(captions.keys() - writer.committed(TEXT))
    encoder = cache(load_text)
    started = time.monotonic()
    with ExitStack() as stack:
        progress = stack.enter_context(Progress("captions", todo, "captions")) if todo else None
        writes = stack.enter_context(Behind(_WRITES, "write"))
        results = stack.enter_context(Behind(_RESULTS, "result"))
        making = _Making(writes, progress)
        for job in writer.jobs(TEXT, captions.keys()):
            for batch in _batches(job, captions, batch_size):
                results.do(making.read, batch, encoder().start(batch.captions))
            results.do(writes.do, job.finish)
    making.tally.seconds = time.monotonic() - started
    return making.tally


def _batches(job: ShardJob, captions: Mapping[str, str], size: int) -> Iterator[_Batch]:
    """Batches with something missing.

    They are cut from the shard's whole plan, so that a resumed run forms the same ones: a row's last bits may depend on
    the shape of its batch.
    """
    remaining = frozenset(job.remaining)
    for start in range(0, len(job.planned), size):
        keys = job.planned[start : start + size]
        missing = remaining.intersection(keys)
        if missing:
            yield _Batch(job, keys, [captions.get(key, "") for key in keys], missing)


class _Making:
    """Reads embeddings in one thread, has them written and counted in another."""

    def __init__(self, writes: Behind, progress: Progress | None) -> None:
        self.tally = Tally()
        self._writes, self._progress = writes, progress

    def read(self, batch: _Batch, running: Running) -> None:
        embeddings = running.result()
        for key, caption, embedding in zip(batch.keys, batch.captions, embeddings, strict=True):
            if key not in batch.missing:
                continue
            if not embedding.isfinite().all():
                if not caption:
                    raise ModelError(f"{_NOT_FINITE.partition(';')[0]}.", "Try --text-dtype float32.")
                self._writes.do(self._fail, batch.job, key, caption)
            else:
                self._writes.do(self._write, batch.job, key, caption, embedding)

    def _write(self, job: ShardJob, key: str, caption: str, embedding: torch.Tensor) -> None:
        job.append(Entry(key, {"prompt_embeds": embedding.clone()}, {"caption": caption}))
        self.tally.encoded += 1
        self._show()

    def _fail(self, job: ShardJob, key: str, caption: str) -> None:
        job.fail(key, caption[:200], _NOT_FINITE)
        self.tally.failed += 1
        self._show()

    def _show(self) -> None:
        if self._progress:
            self._progress.advance(failed=self.tally.failed)
