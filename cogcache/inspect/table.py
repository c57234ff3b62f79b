"""A cache told in lines for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cogcache.wording import counted

__all__ = ["as_text", "size_text"]

_FEW = 10


def size_text(count: int) -> str:
    """``4.5 MB``: decimal units, two significant digits at least."""
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{count} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def as_text(report: Mapping[str, Any]) -> str:
    """The report as aligned lines, ``name  value``."""
    rows: list[tuple[str, str]] = [
        ("cache", report["root"]),
        ("model", report["model"]["id"]),
        ("fingerprint", report["fingerprint"]),
        ("clips", f"{report['clips']}, {report['failed']} failed"),
        *_counted("bucket", report["buckets"]),
        *_series(report["series"]),
        ("captions", _captions(report["captions"])),
    ]
    if found := report["durations"]:
        span = f"{found['shortest']:.2f} to {found['longest']:.2f} s, median {found['median']:.2f} s"
        rows.append(("durations", f"{span}, {found['total']:.0f} s together"))
    rows += [*_counted("reader", report["readers"]), *_counted("codec", report["codecs"])]
    if latents := report["latents"]:
        rows.append(("latents", f"mean {latents['mean']:.4f}, spread {latents['std']:.4f}"))
        rows += _outliers(report)
    rows += _counted("failure", report["reasons"])
    for name, series in report["series"].items():
        rows += [(f"{name}.{field}", str(value)) for field, value in series["fingerprint"].items()]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {_one_line(value)}" for name, value in rows)


def _one_line(text: str) -> str:
    """Nothing from a file may steer the terminal."""
    return "".join(c if c.isprintable() else " " for c in text)


def _counted(name: str, counts: Mapping[str, int]) -> list[tuple[str, str]]:
    rows = [(name, f"{count} x {value}") for value, count in list(counts.items())[:_FEW]]
    return [*rows, (name, f"and {len(counts) - _FEW} more kinds")] if len(counts) > _FEW else rows


def _series(series: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(name, f"{size_text(value['bytes'])} in {_shards(value)}") for name, value in series.items()]


def _shards(value: Mapping[str, Any]) -> str:
    return f"{counted(value['shards'], 'shard')}, {counted(value['entries'], 'entry', 'entries')}"


def _captions(found: Mapping[str, Any]) -> str:
    shared = f"{found['duplicates']} clips share one" if found["duplicates"] else "none shared"
    longest = f"longest {found['longest_characters']} characters, {found['longest_words']} words"
    return f"{found['unique']} different, {shared}; {longest}"


def _outliers(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    found = sorted(
        (clip for clip in report["samples"] if "outlier" in clip["flags"]), key=lambda clip: -(clip["score"])
    )
    rows = [
        ("outlier", f"{clip['source']} ({clip['window']}): robust z {clip['score']:.1f}")
        for clip in found[:_FEW]
    ]
    return [*rows, ("outlier", f"and {len(found) - _FEW} more")] if len(found) > _FEW else rows
