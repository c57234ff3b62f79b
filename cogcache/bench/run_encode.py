"""What ``cogcache bench encode`` does: make what is measured, measure, tell."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.table import Table

from cogcache.bench import frozen
from cogcache.bench.card import cap_gpu_memory
from cogcache.bench.encode import ClipRow, Job, accuracy, our_row, reference_row, text_rows
from cogcache.bench.facts import machine_facts
from cogcache.bench.output import write_figures
from cogcache.bench.video_clips import make_videos
from cogcache.errors import CogcacheError, ConfigError
from cogcache.geometry import parse_bucket
from cogcache.models import pick_device
from cogcache.precompute.datasets import find_clips
from cogcache.progress import console, say

__all__ = ["PARTS", "bench_encode"]

PARTS = ("reference", "untiled", "tiled", "text", "accuracy")


def bench_encode(
    *,
    data_root: Path | None,
    clips: int,
    bucket: str,
    fps: float,
    parts: str,
    device: str,
    workers: int | None,
    captions: int,
    text_batch_size: int,
    gpu_memory: float | None,
    work: Path,
    json_out: Path | None,
) -> None:
    """Measure what ``parts`` names, print tables, and write the figures as JSON where asked, anew after each row.

    Raises:
        ConfigError: if a part is not known, the GPU has less than ``gpu_memory`` GiB, or no videos can be made here
            and none are given.
        CogcacheError: as ``encode``.
    """
    wanted = _parts(parts)
    cap_gpu_memory(gpu_memory)
    work.mkdir(parents=True, exist_ok=True)
    videos = data_root or make_videos(work / "videos", clips)
    paths = [item.path for item in find_clips(videos, "auto", False)]
    facts = machine_facts()
    say(f"{facts['gpu'] or facts['cpu']}, {facts['cores']} cores, commit {facts['commit']}, {bucket}")
    found: dict[str, Any] = {"bucket": bucket, "videos": len(paths), "gpu_memory_gib": gpu_memory}
    with TemporaryDirectory(dir=work) as scratch:
        root = frozen.model_folder(Path(scratch) / "model")
        job = Job(root, videos, Path(scratch), parse_bucket(bucket), pick_device(device), fps, workers)
        measured = {"clips": _clip_rows(job, paths, wanted)}
        if "accuracy" in wanted:
            measured["accuracy"] = _rows(accuracy(job, paths[0]))
        if "text" in wanted:
            measured["text"] = _text_rows(job, captions, text_batch_size)
        for name, rows in measured.items():
            found[name] = []
            for row in rows:
                found[name].append(row)
                # after each, so that nothing is lost if the next one is stopped
                write_figures(json_out, facts, found)
            _tell(found[name])


def _parts(text: str) -> set[str]:
    names = {name.strip() for name in text.split(",")}
    if unknown := sorted(names - set(PARTS)):
        raise ConfigError(f"{unknown[0]!r:.40} cannot be measured.", "Choose from " + ", ".join(PARTS) + ".")
    return names


def _clip_rows(job: Job, paths: list[Path], wanted: Collection[str]) -> Iterator[dict[str, Any]]:
    """Rows with their ratio to the reference, each told as it comes; the text of the error where one fails."""
    reference = None
    for name in ("reference", "untiled", "tiled"):
        if name not in wanted:
            continue
        with _device_emptied():  # around what catches errors, too, for those hold what was on the device
            row = _clip_row(job, paths, name)
        if isinstance(row, dict):
            yield row
            continue
        reference = row.clips_per_s if name == "reference" else reference
        ratio = row.clips_per_s / reference if reference else None
        say(f"{name}: {row.clips_per_s:.2f} clips/s, GPU busy {row.gpu_busy:.0%}, {row.peak_gib:.2f} GiB")
        yield {**asdict(row), "ratio": ratio}


def _clip_row(job: Job, paths: list[Path], name: str) -> ClipRow | dict[str, Any]:
    try:
        if name == "reference":
            return reference_row(job, paths[:8])  # it is slow, and the same for every clip
        return our_row(job, tiled=name == "tiled")
    except (CogcacheError, torch.OutOfMemoryError) as error:
        return _failed(name, error)


def _text_rows(job: Job, captions: int, batch: int) -> Iterator[dict[str, Any]]:
    """The encoder on the device, then the same one with its weights on the host."""
    sizes = {"one by one": 1, f"batches of {batch}": batch}
    for offloaded in (False, True):
        with _device_emptied():
            if offloaded:
                sizes = {f"batches of {batch}, weights streamed": batch}
            try:
                text = frozen.real_text(job.root, "bfloat16", 226, job.device, offloaded=offloaded)
                yield from _rows(text_rows(text, job.device, captions, sizes))
                del text
            except (CogcacheError, torch.OutOfMemoryError) as error:
                failed = _failed(", ".join(sizes), error)
            else:
                continue
        yield failed


def _failed(recipe: str, error: Exception) -> dict[str, Any]:
    """A row that has no figures; the error's first sentence says why."""
    reason = re.split(r"(?<=\.)\s", str(error), maxsplit=1)[0]
    say(f"{recipe}: {reason}")
    return {"recipe": recipe, "failed": reason}


def _rows(rows: Iterator[Any]) -> Iterator[dict[str, Any]]:
    for row in rows:
        torch.cuda.empty_cache()
        yield asdict(row)


@contextmanager
def _device_emptied() -> Iterator[None]:
    """Leave nothing of what is done inside on the device."""
    import gc

    try:
        yield
    finally:
        gc.collect()
        torch.cuda.empty_cache()


def _tell(rows: list[dict[str, Any]]) -> None:
    if not rows:
        return
    names = list(dict.fromkeys(name for row in rows for name in row))
    table = Table(*(name.replace("_", " ") for name in names))
    for row in rows:
        table.add_row(*(_figure(row.get(name)) for name in names))
    console().print(table)


def _figure(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)
