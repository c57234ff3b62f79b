"""What a cache takes on disk, and what it takes to encode it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

from cogcache.geometry import Bucket
from cogcache.planner.subject import Clips, Model
from cogcache.planner.target import Target
from cogcache.precompute.choose_tiling import must_tile
from cogcache.train.memory.gpus import CARDS
from cogcache.variants import Variant

__all__ = ["Disk", "disk_of", "encode_seconds", "encodes_in_tiles"]

_ENTRY = 2700
"""Bytes of an entry in tar shards beside its values: headers, facts, index (records/2026-11-22-formats.md)."""
_ZSTD = {"latents": 0.613, "text": 0.731, "images": 0.79}
"""What zstd leaves of random values (the same record); real ones compress rather better."""

_CLIP = Bucket(49, 480, 720)
_CLIP_S, _FRAME_S, _CAPTION_S = 0.311, 0.0114, 1 / 152
"""A clip and a first frame, untiled, on an H200 (records/2026-11-22-encoding.md), and a caption of 226 tokens, 32 at
once (records/2026-11-29-one-gpu.md).
"""
_TILED = 2.68 / 1.70
"""How much longer it takes in tiles: clips/s of one run untiled and tiled (records/2026-11-29-one-gpu.md)."""
_H200_LINEAR = CARDS[0].rates.linear


@dataclass(frozen=True)
class Disk:
    """Bytes as tar shards by series, and of all together with 8-bit log-variances, and in compressed zarr arrays."""

    latents: int
    text: int
    images: int
    eight_bit: int
    zarr: int

    @property
    def together(self) -> int:
        """All series, as tar shards."""
        return self.latents + self.text + self.images


def disk_of(variant: Variant, clips: Clips, image_draws: int) -> Disk:
    """What a cache of ``clips`` takes, each with a caption of its own; 16 bits a value.

    Args:
        image_draws: First frames kept of each clip, for image-to-video.
    """
    draws = _draws(variant, image_draws)
    count = sum(clips.buckets.values())
    entries = {"latents": count, "text": count + 1, "images": draws * count}  # the empty caption is kept, too
    values = {
        "latents": _over(clips, lambda bucket: 4 * prod(variant.latent_shape(bucket.frames, bucket.size))),
        "text": entries["text"] * 2 * variant.text_length * variant.text_dim,
        "images": draws * _over(clips, lambda bucket: 2 * prod(variant.latent_shape(1, bucket.size))),
    }
    tar = {name: values[name] + _ENTRY * entries[name] for name in values}
    return Disk(
        **tar,
        eight_bit=sum(tar.values()) - values["latents"] // 4,
        zarr=round(sum(size * _ZSTD[name] for name, size in values.items())),
    )


def encodes_in_tiles(model: Model, clips: Clips, target: Target) -> bool:
    """Whether ``encode`` would have to work in tiles there; where the VAE is not known, it is taken not to."""
    # With the encoder's kernels, as encode's times are. The VAE is published in the transformer's dtype.
    return model.usual_vae and must_tile(clips.buckets, model.dtype, target.free.device, kernels=True)


def encode_seconds(model: Model, clips: Clips, image_draws: int, target: Target) -> float | None:
    """What the GPU needs to encode ``clips``, in tiles where it must; None where the VAE or the GPU is not known.

    It scales with pixels and with the GPU's matrix products. Reading the videos is the CPU's work beside it.
    """
    if target.rates is None or not model.usual_vae:
        return None
    longer = _TILED if encodes_in_tiles(model, clips, target) else 1
    frames = _draws(model.variant, image_draws) * _FRAME_S / (_CLIP.height * _CLIP.width)
    pixels = _over(clips, lambda bucket: bucket.volume) * _CLIP_S / _CLIP.volume
    firsts = _over(clips, lambda bucket: bucket.height * bucket.width) * frames
    captions = sum(clips.buckets.values()) * _CAPTION_S
    return (longer * (pixels + firsts) + captions) * _H200_LINEAR / target.rates.linear


def _draws(variant: Variant, image_draws: int) -> int:
    return image_draws if variant.task == "i2v" else 0


def _over(clips: Clips, size: Callable[[Bucket], int]) -> int:
    return sum(count * size(bucket) for bucket, count in clips.buckets.items())
