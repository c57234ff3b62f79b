"""What is to be made for each clip: its latent, and for image-to-video its bank of image conditions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from cogcache.cache.format import Entry
from cogcache.cache.moments import MOMENTS, MOMENTS_8BIT, pack_moments
from cogcache.errors import TooShortError, VideoError
from cogcache.precompute.clips import ClipWork
from cogcache.precompute.images import Draw, ImageSource, make_draw, start_draw
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


def image_pieces(clip: ClipWork, settings: EncodeSettings) -> list[Piece[FrozenVae, _Drawn]]:
    """The work of making a clip's image-condition bank, one piece a draw; none for text-to-video."""
    if clip.image is None:
        return []
    return _pieces_of(clip.image, list(enumerate(clip.images)), settings)


def validation_pieces(
    images: Mapping[str, ImageSource], settings: EncodeSettings
) -> list[Piece[FrozenVae, _Drawn]]:
    """The work of making the noise-free first frames of validation prompts, from key to picture."""
    return [piece for key, source in images.items() for piece in _pieces_of(source, [(None, key)], settings)]


class _Drawn(NamedTuple):
    """A picture, uint8 ``[H, W, 3]``, and its draws by number."""

    image_hwc: torch.Tensor
    draws: dict[int | None, Draw]


def _pieces_of(
    source: ImageSource, keys: Sequence[tuple[int | None, str]], settings: EncodeSettings
) -> list[Piece[FrozenVae, _Drawn]]:
    """Pieces of one picture. Its draws are made where it is read: noise takes as long as the VAE on a fast GPU."""
    numbers = [number for number, _ in keys]

    def read() -> _Drawn:
        image = source.load(settings)
        return _Drawn(image, {number: make_draw(source, number, image) for number in numbers})

    def piece(number: int | None, key: str) -> Piece[FrozenVae, _Drawn]:
        def start(vae: FrozenVae, drawn: _Drawn) -> Callable[[], Entry]:
            return start_draw(vae, drawn.image_hwc, drawn.draws[number], source, key)

        return Piece(key, source.name, str(source.size), f"{source.identity} {numbers}", read, start)

    return [piece(number, key) for number, key in keys]
