"""``cogcache bench load``: how fast samples come out of a cache, beside raw reads of the same bytes.

Every way of reading gets the same samples in the same order and the same threads, one after the other in one run:

- ``raw``: whole files, one a tensor, by ``pread`` into fresh memory; nothing is checked or parsed: the ceiling.
- ``safetensors``: the same files through ``safetensors.torch.load_file``, as trainers with one file per sample read;
  it only maps them, so their values are copied once, as stacking a batch does.
- each cache: latents and embedding of each sample through :class:`CacheReader`, every byte checked. ``server`` is one
  at a URL, ``server, kept`` the same through its local copy, which the first of the repeats fills.

*Cold* means that the operating system was asked to forget the files first; what lies below it may still remember.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from cogcache.cache.format import LATENTS, TEXT, SampleRecord
from cogcache.cache.reader import CacheReader
from cogcache.config import TrainConfig
from cogcache.progress import Progress
from cogcache.train.data import Samples, read_ahead, step_plans

__all__ = ["Reading", "Waiting", "measure_reads", "measure_wait", "write_files"]

_CHUNK = 1 << 20
Read = Callable[[SampleRecord], object]


@dataclass(frozen=True)
class Reading:
    """One measured way of reading: best of the repeats. ``share_of_raw`` compares rows of equal other fields."""

    way: str
    order: str
    cold: bool
    workers: int
    samples_per_s: float
    mb_per_s: float
    share_of_raw: float | None = None


@dataclass(frozen=True)
class Waiting:
    """What a consumer of ``steps_per_s`` saw: share of the time it waited for data, after the first step."""

    steps_per_s: float
    workers: int
    waited_share: float
    longest_wait_ms: float
    cpu_s_per_step: float


def write_files(reader: CacheReader, folder: Path) -> dict[str, Path]:
    """One safetensors file for each latent and each embedding that samples use; returns key -> file."""
    folder.mkdir(parents=True, exist_ok=True)
    keys = dict.fromkeys(
        need for row in reader.samples for need in ((LATENTS, row.latents), (TEXT, row.text))
    )
    files = {}
    with Progress("Writing single files", len(keys), "files") as progress:
        for series, key in keys:
            files[key] = folder / f"{key}.safetensors"
            if not files[key].exists():
                save_file(dict(reader.read(series, key).tensors), files[key])
            progress.advance()
    os.sync()
    return files


def measure_reads(
    caches: Mapping[str, CacheReader],
    files: Mapping[str, Path],
    workers: Sequence[int],
    *,
    repeats: int = 3,
    cold: bool = True,
) -> list[Reading]:
    """Read all samples in every way, in order and shuffled, cold and warm, with each number of threads.

    Args:
        caches: Name -> cache; all of the same samples.
        files: Key -> file, from :func:`write_files`.
        repeats: Each figure is the fastest of so many.
        cold: Whether to measure cold reads too.
    """
    first = next(iter(caches.values()))
    size = sum(files[row.latents].stat().st_size + files[row.text].stat().st_size for row in first.samples)
    ways: dict[str, Read] = {
        "raw": lambda row: (_raw(files[row.latents]), _raw(files[row.text])),
        "safetensors": lambda row: (_file(files[row.latents]), _file(files[row.text])),
        **{name: _through(cache) for name, cache in caches.items()},
    }
    paths = [*files.values(), *(path for cache in caches.values() for path in _data_files(cache))]
    cases = [
        (order, chill, threads)
        for order in ("sequential", "random")
        for chill in ([True, False] if cold else [False])
        for threads in workers
    ]
    readings = []
    with Progress("Reading", len(cases) * len(ways), "runs") as progress:
        for order, chill, threads in cases:
            best = dict.fromkeys(ways, float("inf"))
            for turn in range(repeats):
                rows = _ordered(first, order, turn)
                for name, read in ways.items():  # alternating, so that drifts of the machine hit all alike
                    _forget(paths if chill else [])
                    best[name] = min(best[name], _timed(read, rows, threads))
            for name, seconds in best.items():
                readings.append(
                    Reading(
                        name,
                        order,
                        chill,
                        threads,
                        len(first.samples) / seconds,
                        size / seconds / 1e6,
                        best["raw"] / seconds,
                    )
                )
                progress.advance()
    return readings


def _through(cache: CacheReader) -> Read:
    return lambda row: (cache.read(LATENTS, row.latents), cache.read(TEXT, row.text))


def _raw(path: Path) -> torch.Tensor:
    fd = os.open(path, os.O_RDONLY)
    try:
        buffer = torch.empty(os.fstat(fd).st_size, dtype=torch.uint8)
        view, done = buffer.numpy().data, 0
        while done < len(view):
            done += os.preadv(fd, [view[done:]], done)
        return buffer
    finally:
        os.close(fd)


def _file(path: Path) -> list[torch.Tensor]:
    return [value.clone() for value in load_file(path).values()]


def _data_files(cache: CacheReader) -> Iterator[Path]:
    root = cache.root
    return (path for path in root.rglob("*") if path.is_file()) if isinstance(root, Path) else iter(())


def _ordered(cache: CacheReader, order: str, turn: int) -> list[SampleRecord]:
    """Rows in the order of the shards, or shuffled differently each turn."""
    if order == "random":
        return random.Random(turn).sample(cache.samples, len(cache.samples))
    place = {key: number for number, key in enumerate(cache.keys(LATENTS))}
    return sorted(cache.samples, key=lambda row: place[row.latents])


def _forget(paths: Sequence[Path]) -> None:
    """Drop the files from the page cache; all of it has been written before."""
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def _timed(read: Read, rows: Sequence[SampleRecord], threads: int) -> float:
    started = time.perf_counter()
    if threads == 1:
        for row in rows:
            read(row)
    else:
        with ThreadPoolExecutor(threads) as pool:
            for _ in pool.map(read, rows):
                pass
    return time.perf_counter() - started


def measure_wait(cache: CacheReader, workers: int, steps: int, steps_per_s: float = 10.0) -> Waiting:
    """Feed a consumer that takes one batch of 1 every ``1 / steps_per_s`` seconds, as a GPU would, noise drawn and all.

    The first step is not counted: nothing can be ready before it.
    """
    samples = Samples(cache, cache.manifest.model.variant, _config(steps, workers))
    plans = step_plans(samples.records, samples.config, 1)
    batches = read_ahead(samples.batch, (plan.micros[0][0] for plan in plans), workers)
    next(batches)
    waits = []
    cpu, started = time.process_time(), time.perf_counter()
    due = started
    for _ in range(steps - 1):
        due = max(due + 1 / steps_per_s, time.perf_counter())
        time.sleep(max(0.0, due - time.perf_counter()))
        asked = time.perf_counter()
        next(batches)
        waits.append(time.perf_counter() - asked)
    seconds = time.perf_counter() - started
    used = time.process_time() - cpu
    return Waiting(steps_per_s, workers, sum(waits) / seconds, max(waits) * 1e3, used / (steps - 1))


def _config(steps: int, workers: int) -> TrainConfig:
    return TrainConfig(shards=Path("unused"), output=Path("unused"), steps=steps, workers=workers)
