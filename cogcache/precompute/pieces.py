"""What is to be made for each clip: its latent, and for image-to-video its bank of image conditions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from cogcache.cache.format import Entry
from cogcache.cache.moments import MOMENTS, MOMENTS_8BIT, pack_moments
from cogcache.errors import TooShortError, VideoError
from cogcache.precompute.clips import ClipWork
from cogcache.precompute.images import ImageSource, start_draw
from cogcache.precompute.piece import Piece
from cogcache.precompute.settings import EncodeSettings
from cogcache.precompute.vae import FrozenVae
from cogcache.video import Clip, load_clip

__all__ = ["image_pieces", "latent_piece", "validation_pieces"]


def latent_piece(clip: ClipWork, settings: EncodeSettings) -> Piece[FrozenVae, Clip]:
    """The work of making a clip's latent entry: ``{"moments": [2C, F', H/8, W/8]}``, unscaled, or packed."""
    packed = settings.config.log_variance == "8bit"

    def start(vae: FrozenVae, decoded: Clip) -> Callable[[], Entry]:
        running = vae.start(decoded.frames.unsqueeze(0))
        return lambda: finish(running.result()[0], decoded.facts)

    def finish(moments: torch.Tensor, facts: dict[str, Any]) -> Entry:
        if not torch.isfinite(moments).all():
            raise VideoError("the VAE gave values that are not finite; try --vae-dtype float32")
        tensors = {MOMENTS_8BIT: pack_moments(moments)} if packed else {MOMENTS: moments}
        return Entry(clip.latents, tensors, facts | identity)

    identity = {
        "source": clip.item.source,
        "sha256": clip.sha256,
        "window": clip.window,
        "bucket": str(clip.bucket),
    }

    def read() -> Clip:
        if clip.sha256.startswith("unreadable"):
            raise VideoError(f"cannot be read: {clip.sha256.rsplit(': ', 1)[1]}")  # its key names no content
        if clip.trouble:
            raise TooShortError(clip.trouble)
        return load_clip(clip.item.path, clip.request)

    return Piece(clip.latents, clip.item.source, str(clip.bucket), clip.latents, read, start)


def image_pieces(clip: ClipWork, settings: EncodeSettings) -> list[Piece[FrozenVae, torch.Tensor]]:
    """The work of making a clip's image-condition bank, one piece a draw; none for text-to-video."""
    if clip.image is None:
        return []
    return [_image_piece(clip.image, key, draw, settings) for draw, key in enumerate(clip.images)]


def validation_pieces(
    images: Mapping[str, ImageSource], settings: EncodeSettings
) -> list[Piece[FrozenVae, torch.Tensor]]:
    """The work of making the noise-free first frames of validation prompts, from key to picture."""
    return [_image_piece(source, key, None, settings) for key, source in images.items()]


def _image_piece(
    source: ImageSource, key: str, draw: int | None, settings: EncodeSettings
) -> Piece[FrozenVae, torch.Tensor]:
    def start(vae: FrozenVae, image_hwc: torch.Tensor) -> Callable[[], Entry]:
        return start_draw(vae, image_hwc, source, key, draw)

    return Piece(key, source.name, str(source.size), source.identity, lambda: source.load(settings), start)
