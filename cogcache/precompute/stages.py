"""The encoding stages: latents, then text. Decoding runs ahead of the encoder, writing behind it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch

from cogcache.cache.format import LATENTS, TEXT, Entry
from cogcache.cache.writer import CacheWriter, ShardJob
from cogcache.errors import VideoError
from cogcache.precompute.clips import ClipWork
from cogcache.precompute.text import FrozenText
from cogcache.precompute.vae import FrozenVae
from cogcache.precompute.video import Clip, load_clip
from cogcache.progress import Progress

__all__ = ["Tally", "encode_latents", "encode_text"]

_WRITES_BEHIND = 4


@dataclass
class Tally:
    """What a stage did. Times in seconds."""

    encoded: int = 0
    failed: list[tuple[str, str]] = field(default_factory=list)
    waited_s: float = 0.0
    total_s: float = 0.0


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


def encode_latents(
    writer: CacheWriter, clips: Mapping[str, ClipWork], load_vae: Callable[[], FrozenVae], workers: int
) -> Tally:
    """Encode every clip whose latent is planned and not yet there.

    Args:
        clips: Latent key to clip.
        load_vae: Called once, and only if there is work.
        workers: Decoding threads.
    """
    tally = Tally()
    started = time.monotonic()
    todo = len(clips.keys() - writer.committed(LATENTS))
    if not todo:
        return tally
    with ExitStack() as stack:
        vae = load_vae()
        progress = stack.enter_context(Progress("clips", todo, "clips"))
        behind = stack.enter_context(_Behind())
        for job, clip, future in _decoded_ahead(writer, clips, workers, behind):
            waited = time.monotonic()
            decoded = _result(future)
            tally.waited_s += time.monotonic() - waited
            entry = decoded if isinstance(decoded, VideoError) else _encode_clip(vae, clip, decoded)
            if isinstance(entry, VideoError):
                behind.do(job.fail, clip.latents, clip.item.source, entry.message)
                tally.failed.append((clip.item.source, entry.message))
            else:
                behind.do(job.append, entry)
                tally.encoded += 1
            share = tally.waited_s / max(time.monotonic() - started, 1e-9)
            progress.advance(waiting_for_video=f"{share:.0%}", failed=len(tally.failed))
    tally.total_s = time.monotonic() - started
    return tally


def _decoded_ahead(
    writer: CacheWriter, clips: Mapping[str, ClipWork], workers: int, behind: _Behind
) -> Iterator[tuple[ShardJob, ClipWork, Future[Clip]]]:
    """Claim shards and decode their clips in threads, a few ahead; finish each shard after its last clip."""
    ahead: deque[tuple[ShardJob, str | None, Future[Clip] | None]] = deque()

    def steps() -> Iterator[tuple[ShardJob, str | None, Future[Clip] | None]]:
        for job in writer.jobs(LATENTS, clips.keys()):
            for key in job.remaining:
                clip = clips.get(key)
                if clip is not None:
                    yield job, key, pool.submit(load_clip, clip.item.path, clip.request)
            yield job, None, None

    pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")
    try:
        source = steps()
        exhausted = False
        while ahead or not exhausted:
            while not exhausted and len(ahead) <= workers:
                step = next(source, None)
                exhausted = step is None
                if step is not None:
                    ahead.append(step)
            if not ahead:
                break
            job, key, future = ahead.popleft()
            if key is None or future is None:
                behind.do(job.finish)
            else:
                yield job, clips[key], future
    finally:
        pool.shutdown(cancel_futures=True)


def _result(future: Future[Clip]) -> Clip | VideoError:
    try:
        return future.result()
    except VideoError as error:
        return error
    except MemoryError:
        return VideoError("not enough memory to decode it")


def _encode_clip(vae: FrozenVae, clip: ClipWork, decoded: Clip) -> Entry | VideoError:
    moments = vae.encode(decoded.frames.unsqueeze(0))[0]
    if not torch.isfinite(moments).all():
        return VideoError("the VAE gave values that are not finite; try --vae-dtype float32")
    facts = {**decoded.facts, "source": clip.item.source, "sha256": clip.sha256, "window": clip.window}
    return Entry(clip.latents, {"moments": moments.contiguous()}, facts)


def encode_text(
    writer: CacheWriter, captions: Mapping[str, str], load_text: Callable[[], FrozenText], batch_size: int
) -> Tally:
    """Encode every caption whose embedding is planned and not yet there.

    Args:
        captions: Text key to caption.
        load_text: Called once, and only if there is work.
        batch_size: Captions encoded at once.
    """
    tally = Tally()
    started = time.monotonic()
    todo = len(captions.keys() - writer.committed(TEXT))
    if not todo:
        return tally
    encoder = load_text()
    with Progress("captions", todo, "captions") as progress:
        for job in writer.jobs(TEXT, captions.keys()):
            remaining = set(job.remaining)
            # Batches are cut from the shard's whole plan, so that a resumed run forms the same ones: a row's last
            # bits may depend on the shape of its batch.
            for batch in _batches(job.planned, batch_size):
                missing = [key for key in batch if key in remaining and key in captions]
                if missing:
                    _encode_batch(job, encoder, [captions.get(key, "") for key in batch], batch, missing)
                    tally.encoded += len(missing)
                    progress.advance(len(missing))
            job.finish()
    tally.total_s = time.monotonic() - started
    return tally


def _batches(keys: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    return (keys[start : start + size] for start in range(0, len(keys), size))


def _encode_batch(
    job: ShardJob, encoder: FrozenText, captions: Sequence[str], keys: Sequence[str], missing: Sequence[str]
) -> None:
    embeddings = encoder.encode(captions)
    for key, caption, embedding in zip(keys, captions, embeddings, strict=True):
        if key in missing:
            job.append(Entry(key, {"prompt_embeds": embedding.contiguous().clone()}, {"caption": caption}))
