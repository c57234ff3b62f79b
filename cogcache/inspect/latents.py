"""Reading latents: their statistics, and a picture of each where one is wanted."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cogcache.cache.format import SampleRecord
from cogcache.cache.reader import CacheReader
from cogcache.errors import DamagedCacheError
from cogcache.inspect.gather import Look
from cogcache.inspect.statistics import LatentStatistics

if TYPE_CHECKING:
    import torch

__all__ = ["look_at"]


def _moments(reader: CacheReader, row: SampleRecord) -> torch.Tensor:
    """[2C, F, H, W]."""
    tensor = reader.moments(row.latents)
    if tensor.dim() != 4 or len(tensor) < 2 or not tensor.numel():
        raise DamagedCacheError(
            f"entry {row.latents} of {reader.root} holds no posterior of a clip.",
            "Look at all: cogcache verify.",
        )
    return tensor


def look_at(reader: CacheReader, pictures: bool, data_root: Path | None) -> Look:
    """What :func:`~cogcache.inspect.gather.gather` calls for each clip.

    Args:
        pictures: Whether to make a picture of each.
        data_root: Folder of the videos; where one is not there its picture is made from the latent.
    """

    def look(row: SampleRecord, facts: Mapping[str, Any]) -> tuple[LatentStatistics, str]:
        moments = _moments(reader, row).float().numpy()
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
