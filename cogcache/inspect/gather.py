"""From a cache to one JSON value that holds everything there is to tell about it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from cogcache.cache.format import LATENTS, SampleRecord
from cogcache.cache.reader import CacheReader
from cogcache.inspect.statistics import OUTLIER, LatentStatistics, pooled, robust_z
from cogcache.progress import Progress

__all__ = ["Look", "gather"]

Look = Callable[[SampleRecord, Mapping[str, Any]], tuple[LatentStatistics, str]]
"""Looks at a clip's latent: its statistics, and a picture as a data URI (empty: none)."""


def gather(reader: CacheReader, look: Look | None = None) -> dict[str, Any]:
    """Everything about a cache, as plain JSON values.

    Args:
        look: Called for each clip where its latent is to be read; without it only facts are.

    Raises:
        DamagedCacheError: if an entry that is read is not the one that was committed.
    """
    clips, statistics = _clips(reader, look)
    _mark_outliers(clips, statistics)
    totals = Counter(row.caption for row in reader.samples)
    for clip in clips:
        clip["flags"] += ["duplicate caption"] if totals[clip["caption"]] > 1 else []
    spread = pooled(list(statistics))
    return {
        "root": str(reader.root),
        "fingerprint": reader.manifest.checksum,
        "model": reader.manifest.model.model_dump(mode="json"),
        "backend": reader.manifest.backend,
        "clips": len(clips),
        "failed": len(reader.failures),
        "buckets": _count(_bucket(row) for row in reader.samples),
        "series": _series(reader),
        "captions": _captions(totals),
        "durations": _durations(clips),
        "readers": _count(clip["reader"] for clip in clips),
        "codecs": _count(clip["codec"] for clip in clips),
        "latents": None if spread is None else {"mean": spread[0], "std": spread[1]},
        "outliers": [clip["id"] for clip in clips if "outlier" in clip["flags"]],
        "failures": [row.model_dump(mode="json") for row in reader.failures],
        "reasons": _count(row.reason for row in reader.failures),
        "validation": [row.prompt for row in reader.validation],
        "samples": clips,
    }


_LONGEST_S = 1e9


def _count(values: Any) -> dict[str, int]:
    """Most frequent first, then by name."""
    return dict(sorted(Counter(values).items(), key=lambda item: (-item[1], item[0])))


def _bucket(row: SampleRecord) -> str:
    rate = "source fps" if row.fps is None else f"{row.fps:g} fps"
    return f"{row.frames} x {row.height}x{row.width} @ {rate}"


def _clips(reader: CacheReader, look: Look | None) -> tuple[list[dict[str, Any]], list[LatentStatistics]]:
    clips, statistics = [], []
    title = "facts" if look is None else "latents"
    with Progress(f"Reading {title}", len(reader.samples), "clips") as progress:
        for row in reader.samples:
            facts = reader.facts(LATENTS, row.latents)
            clip = _clip(row, facts)
            if look is not None:
                found, clip["picture"] = look(row, facts)
                clip["mean"], clip["std"] = _number(found.mean), _number(found.std)
                statistics.append(found)
            clips.append(clip)
            progress.advance()
    return clips, statistics


def _clip(row: SampleRecord, facts: Mapping[str, Any]) -> dict[str, Any]:
    times = _times(facts)
    clip = {
        "id": row.id,
        "source": row.source,
        "window": row.window,
        "caption": row.caption,
        "bucket": _bucket(row),
        "frames": row.frames,
        "height": row.height,
        "width": row.width,
        "fps": row.fps,
        "seconds": times[-1] - times[0] if len(times) > 1 else None,
        "flags": ["padded"] if facts.get("padded") else [],
        "images": len(row.images),
    }
    names = (
        "codec",
        "container",
        "source_frames",
        "source_fps",
        "source_duration_s",
        "display_size",
        "sha256",
    )
    clip |= {name: facts[name] for name in names if isinstance(facts.get(name), (str, int, float))}
    return {"reader": str(facts.get("reader", "unknown")), "codec": "unknown", **clip}


def _times(facts: Mapping[str, Any]) -> list[float]:
    """Times of the picked frames in seconds, as far as they are such."""
    times = facts.get("times_s")
    return (
        [t for t in times if type(t) in (int, float) and abs(t) < _LONGEST_S]
        if isinstance(times, list)
        else []
    )


def _mark_outliers(clips: list[dict[str, Any]], statistics: list[LatentStatistics]) -> None:
    scores = zip(
        robust_z([part.mean for part in statistics]), robust_z([part.std for part in statistics]), strict=True
    )
    for clip, (mean, std) in zip(clips, scores, strict=False):
        score = float(max(mean, std))
        clip["score"] = min(score, 1e9)  # JSON has no infinity
        clip["flags"] += ["outlier"] if score >= OUTLIER else []


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _series(reader: CacheReader) -> dict[str, Any]:
    return {
        name: {
            "entries": sum(shard.entries for shard in series.shards),
            "shards": len(series.shards),
            "bytes": sum(shard.bytes for shard in series.shards),
            "fingerprint": series.fingerprint,
        }
        for name, series in reader.manifest.series.items()
    }


def _captions(totals: Counter[str]) -> dict[str, Any]:
    longest = max(totals, key=lambda text: (len(text), text), default="")
    return {
        "unique": len(totals),
        "duplicates": sum(count for count in totals.values() if count > 1),
        "longest_characters": len(longest),
        "longest_words": max((len(text.split()) for text in totals), default=0),
        "longest": longest,
        "empty": totals[""],
    }


def _durations(clips: list[dict[str, Any]]) -> dict[str, float] | None:
    """Seconds between the first and the last picked frame."""
    found = sorted(clip["seconds"] for clip in clips if clip["seconds"] is not None)
    if not found:
        return None
    return {"shortest": found[0], "median": found[len(found) // 2], "longest": found[-1], "total": sum(found)}
