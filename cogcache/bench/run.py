"""What the bench commands do: make what is measured, measure, tell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from cogcache.bench.facts import machine_facts
from cogcache.bench.load import Reading, Waiting, measure_reads, measure_wait, write_files
from cogcache.bench.output import write_figures
from cogcache.bench.random_cache import random_cache, real_variant
from cogcache.cache.backend import BACKENDS
from cogcache.cache.format import MANIFEST_FILE
from cogcache.cache.reader import CacheReader
from cogcache.cache.remote.storage import RemoteOptions
from cogcache.errors import ConfigError
from cogcache.geometry import parse_bucket
from cogcache.progress import Progress, console
from cogcache.tiny import Family

if TYPE_CHECKING:
    from cogcache.bench.train import StepRow

__all__ = ["bench_load", "bench_train"]


def bench_load(
    *,
    family: Family,
    clips: int,
    workers: str,
    work: Path,
    url: str | None,
    repeats: int,
    steps: int,
    cold: bool,
    json_out: Path | None,
) -> None:
    """Measure reads and waiting, print two tables, and write them as JSON where asked.

    Raises:
        ConfigError: if ``workers`` is not a list of positive numbers.
        CacheError, StorageError: if a cache cannot be written or read.
    """
    threads = _numbers(workers)
    variant = real_variant(family)
    caches: dict[str, CacheReader] = {}
    for form in BACKENDS:
        root = work / f"{family}-{clips}-{form}"
        if not (root / MANIFEST_FILE).exists():
            random_cache(root, family, clips, variant, form)
        caches[form] = CacheReader(root)
    if url is not None:
        caches["server"] = CacheReader(url, RemoteOptions(limit=0))
        caches["server, kept"] = CacheReader(url, RemoteOptions(folder=work / "kept"))
    files = write_files(caches["webdataset"], work / f"{family}-{clips}-files")
    readings = measure_reads(caches, files, threads, repeats=repeats, cold=cold)
    waits = _waits(caches, threads, steps)
    facts = machine_facts()
    _tell(readings, waits, facts)
    result = {
        "family": family,
        "clips": clips,
        "reads": [asdict(reading) for reading in readings],
        "waiting": {name: [asdict(wait) for wait in found] for name, found in waits.items()},
    }
    write_figures(json_out, facts, result)


def _waits(caches: Mapping[str, CacheReader], threads: Sequence[int], steps: int) -> dict[str, list[Waiting]]:
    found: dict[str, list[Waiting]] = {name: [] for name in caches}
    with Progress("Waiting for data", len(caches) * len(threads), "runs") as progress:
        for name, cache in caches.items():
            for count in threads:
                found[name].append(measure_wait(cache, count, steps))
                progress.advance()
    return found


def bench_train(
    *,
    family: Family,
    bucket: str | None,
    batch_size: int,
    rank: int,
    recipes: str | None,
    steps: int,
    gpu_memory: float | None,
    json_out: Path | None,
) -> None:
    """Measure a row for each recipe, print each as it comes and a table of all, and write them as JSON where asked.

    A recipe that fails is a row with its error.

    Args:
        recipes: Names joined by commas; None takes those that are no mere comparison.
        gpu_memory: GiB that a row may take, None for all there are.

    Raises:
        ConfigError: if a recipe is not known, or there is no GPU.
    """
    import torch

    from cogcache.allocator_settings import set_up_allocators
    from cogcache.bench.card import cap_gpu_memory
    from cogcache.bench.recipes import DEFAULT_RECIPES, RECIPES
    from cogcache.bench.train import FailedRow, RowSettings, StepRow, rows
    from cogcache.bench.train_table import reference_seconds, row_values, train_table

    set_up_allocators()
    names = [name.strip() for name in recipes.split(",")] if recipes else DEFAULT_RECIPES
    unknown = [name for name in names if name not in RECIPES]
    if unknown:
        raise ConfigError(f"{unknown[0]!r:.40} is no recipe.", "Choose from " + ", ".join(RECIPES) + ".")
    if not torch.cuda.is_available():
        raise ConfigError("a training step of real size is measured on a GPU, and there is none.")
    shape = str(parse_bucket(bucket)) if bucket else _OWN[family]
    cap_gpu_memory(gpu_memory)  # here to refuse; each row does it for itself
    facts, found = machine_facts(), list[StepRow | FailedRow]()
    out = console()
    out.print(f"{facts['gpu']}, commit {facts['commit']}: {family}, {shape}, batch {batch_size}, rank {rank}")
    for row in rows(
        [RowSettings(name, family, shape, batch_size, rank, steps, gpu_memory) for name in names]
    ):
        found.append(row)
        if isinstance(row, FailedRow):
            out.print(f"{row.recipe}: failed: {row.failed}", markup=False)
        else:
            out.print(_told(row, reference_seconds(found)), markup=False)
        # after each, so that nothing is lost if the next one is stopped
        result = {"family": family, "bucket": shape, "rank": rank, "gpu_memory_gib": gpu_memory}
        result["rows"] = row_values(found)
        write_figures(json_out, facts, result)
    out.print(train_table(found))


def _told(row: StepRow, reference: float | None) -> str:
    return (
        f"{row.recipe}: {row.step_s:.3f} s{_planned(row.step_s, row.predicted_s)}, "
        f"{row.peak_gib:.2f} GiB{_planned(row.peak_gib, row.predicted_gib)}"
        + (f", {reference / row.step_s:.2f}x the reference" if reference else "")
    )


def _planned(measured: float, predicted: float | None) -> str:
    return f" (planned {predicted:.2f}, {predicted / measured - 1:+.1%})" if predicted and measured else ""


_OWN: dict[Family, str] = {
    "2b": "49x480x720",
    "5b": "49x480x720",
    "5b-i2v": "49x480x720",
    "1.5-5b": "81x768x1360",
    "1.5-5b-i2v": "81x768x1360",
}


def _numbers(text: str) -> list[int]:
    try:
        numbers = [int(word) for word in text.split(",")]
    except ValueError:
        numbers = [0]
    if min(numbers) < 1:
        raise ConfigError(f"--workers {text!r:.60}: give numbers of 1 or more, as 1,2,4.")
    return numbers


def _tell(readings: Sequence[Reading], waits: dict[str, list[Waiting]], facts: dict[str, object]) -> None:
    out = console()
    out.print(f"{facts['cpu']}, {facts['cores']} cores, commit {facts['commit']}", markup=False)
    table = Table("order", "from", "threads", "way", "samples/s", "MB/s", "of raw")
    for one in readings:
        share = f"{one.share_of_raw:.0%}" if one.share_of_raw is not None else ""
        source = "disk" if one.cold else "memory"
        figures = f"{one.samples_per_s:.1f}", f"{one.mb_per_s:.0f}"
        table.add_row(one.order, source, str(one.workers), one.way, *figures, share)
    out.print(table)
    table = Table("cache", "threads", "steps/s", "waited for data", "longest wait", "CPU a step")
    for name, found in waits.items():
        for wait in found:
            figures = f"{wait.waited_share:.2%}", f"{wait.longest_wait_ms:.1f} ms"
            cpu = f"{wait.cpu_s_per_step * 1e3:.0f} ms"
            table.add_row(name, str(wait.workers), f"{wait.steps_per_s:g}", *figures, cpu)
    out.print(table)
