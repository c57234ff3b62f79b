"""A look at each video that decides its bucket: size as shown, and how many frames it gives."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cogcache.errors import VideoError
from cogcache.geometry import Size
from cogcache.memory import remembered
from cogcache.precompute.buckets import ClipShape
from cogcache.progress import Progress
from cogcache.video.picking import frames_available
from cogcache.video.probe import probe

__all__ = ["look_at"]


def look_at(paths: Sequence[Path], fps: float | None, workers: int) -> list[ClipShape | None]:
    """The shape of each video, in order; None where it cannot be read. Remembered between runs.

    Args:
        fps: Rate at which frames will be picked; None takes those of the source.
        workers: Threads.
    """
    shapes = []
    with ThreadPoolExecutor(workers) as pool, Progress("Looking at clips", len(paths), "clips") as progress:
        for shape in pool.map(lambda path: _shape(path, fps), paths):
            shapes.append(shape)
            progress.advance()
    return shapes


def _shape(path: Path, fps: float | None) -> ClipShape | None:
    try:
        height, width, frames, duration_s, tick_s = json.loads(remembered("shape", path, _facts))
    except (OSError, VideoError):
        return None
    return ClipShape(
        Size(height, width), frames_available(frames, duration_s, tick_s, fps), still=frames == 1
    )


def _facts(path: Path) -> str:
    info = probe(path).info
    shown = info.display
    return json.dumps([shown.height, shown.width, info.frames, info.duration_s, info.tick_s])
