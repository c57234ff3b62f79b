"""Reading latents: their statistics, and a picture of each where one is wanted."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cogcache.cache.format import SampleRecord
from cogcache.cache.reader import CacheReader
from cogcache.inspect.gather import Look
from cogcache.inspect.statistics import LatentStatistics

__all__ = ["look_at"]


def look_at(reader: CacheReader, pictures: bool, data_root: Path | None) -> Look:
    """What :func:`~cogcache.inspect.gather.gather` calls for each clip.

    Args:
        pictures: Whether to make a picture of each.
        data_root: Folder of the videos; where one is not there its picture is made from the latent.
    """

    def look(row: SampleRecord, facts: Mapping[str, Any]) -> tuple[LatentStatistics, str]:
        moments = reader.moments(row.latents).float().numpy()
        mean = moments[: len(moments) // 2]
        found = LatentStatistics(
            float(mean.mean(dtype="float64")), float(mean.std(dtype="float64")), mean.size
        )
        if not pictures:
            return found, ""
        from cogcache.inspect.pictures import false_colours, find_video, strip, video_frames

        video = find_video(data_root, row.source)
        frames = video_frames(video, facts) if video else None
        return found, strip(frames or false_colours(mean))

    return look
