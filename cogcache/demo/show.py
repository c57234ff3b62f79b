"""What the demo shows: real frames, what the VAE makes of them, and what base and LoRA generate."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cogcache.cache.format import SampleRecord
from cogcache.cache.reader import CacheReader
from cogcache.config import EncodeConfig
from cogcache.mp4 import read_mp4

__all__ = ["Clip", "Generation", "Show", "read_losses", "real_and_decoded", "with_generations"]

Frames = NDArray[np.uint8]
"""RGB ``[F, H, W, 3]``."""


@dataclass(frozen=True)
class Generation:
    """Videos of one caption and one seed: the base model's, and that with the LoRA."""

    seed: int
    base: Frames
    lora: Frames


@dataclass(frozen=True)
class Clip:
    """One clip of the demo. ``psnr_db`` is that of what the VAE makes of it."""

    caption: str
    real: Frames
    decoded: Frames
    psnr_db: float
    generations: tuple[Generation, ...] = ()


@dataclass(frozen=True)
class Show:
    """All that picture and page tell. ``losses`` are (step, loss); ``remark`` says what to expect, in a sentence."""

    title: str
    remark: str
    fps: float
    clips: Sequence[Clip]
    losses: Sequence[tuple[int, float]]


def real_and_decoded(config: EncodeConfig, rows: Sequence[SampleRecord]) -> list[Clip]:
    """The clips of a cache as they were read from their videos, and as the VAE decodes what is stored.

    Args:
        config: What the cache was made with.
        rows: Clips of the cache.
    """
    import torch

    from cogcache.decode import open_decoder
    from cogcache.geometry import Size
    from cogcache.models import torch_dtype
    from cogcache.precompute.clips import plan_clips
    from cogcache.precompute.datasets import find_clips
    from cogcache.precompute.redo import psnr
    from cogcache.precompute.settings import decide
    from cogcache.video import load_clip

    settings, reader = decide(config), CacheReader(config.shards or "")
    items = find_clips(config.data_root, config.dataset, config.allow_outside)
    works = {work.latents: work for work in plan_clips(items, settings)}
    size, clips = Size(rows[0].height, rows[0].width), list[Clip]()
    dtype = torch_dtype(settings.vae_dtype)
    with open_decoder(settings.model_root, dtype, settings.device, size) as decoder:
        for row in rows:
            work = works[row.latents]
            real = load_clip(work.item.path, work.request).frames
            mean_cfhw = reader.moments(row.latents).chunk(2)[0].float()
            decoded = decoder.decode((mean_cfhw * settings.variant.scaling_factor).transpose(0, 1))
            clips.append(
                Clip(row.caption, real.numpy(), decoded, psnr(torch.from_numpy(decoded.copy()), real))
            )
    return clips


def with_generations(clip: Clip, seeds: Sequence[int], base: Sequence[Path], lora: Sequence[Path]) -> Clip:
    """The clip with the videos that were generated for its caption, in the order of the seeds."""
    made = tuple(
        Generation(seed, read_mp4(one)[0], read_mp4(other)[0])
        for seed, one, other in zip(seeds, base, lora, strict=True)
    )
    return Clip(clip.caption, clip.real, clip.decoded, clip.psnr_db, made)


def read_losses(metrics: Path) -> list[tuple[int, float]]:
    """(step, loss) of a training."""
    rows = map(json.loads, metrics.read_text("utf-8").splitlines())
    return [(row["step"], row["loss"]) for row in rows if "loss" in row]
