"""The image-condition bank of image-to-video models: K noised draws of each clip's first frame.

In CogVideoX training the conditioning image gets noise in pixel space *before* the VAE, with
sigma = exp(N(-3.0, 0.5)) per sample, so no single cached latent reproduces it. A bank of K independent draws keeps
training free of the VAE and its distribution right. Source: the CogVideo reference trainer.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from cogcache.cache.format import Entry, Fingerprint
from cogcache.cache.keys import image_key
from cogcache.draws import generator, seed_for
from cogcache.errors import VideoError
from cogcache.geometry import Size
from cogcache.hashing import content_id
from cogcache.pictures import load_picture
from cogcache.precompute.settings import SIGMA_LOG_MEAN, SIGMA_LOG_STD, EncodeSettings
from cogcache.precompute.vae import FrozenVae, to_pixels
from cogcache.video import ClipRequest, load_first_frame

__all__ = ["Draw", "ImageSource", "clean_key", "draw_keys", "make_draw", "start_draw"]


@dataclass(frozen=True)
class ImageSource:
    """Where a conditioning image comes from: a picture file, or the first frame of a clip; and its size when fitted.

    ``identity`` changes when the picture does.
    """

    path: Path
    request: ClipRequest | None
    identity: str
    name: str
    size: Size

    @classmethod
    def of_file(cls, path: Path, name: str, size: Size) -> ImageSource:
        """A picture file."""
        return cls(path, None, f"file {content_id(path)}", name, size)

    @classmethod
    def of_clip(cls, path: Path, request: ClipRequest, sha256: str, name: str) -> ImageSource:
        """The first frame of the clip that ``request`` picks."""
        picked = f"frames {request.frames} fps {request.fps} window {request.window} short {request.short}"
        return cls(path, request, f"clip {sha256} {picked} reader {request.reader}", name, request.size)

    def load(self, settings: EncodeSettings) -> torch.Tensor:
        """The fitted picture, uint8 ``[H, W, 3]``.

        Raises:
            VideoError: if it cannot be read.
        """
        if self.identity.startswith(("file unreadable", "clip unreadable")):  # its key names no content
            raise VideoError("the file could not be read")
        if self.request is not None:
            return load_first_frame(self.path, self.request)
        return load_picture(self.path, self.size, settings.config.fit, settings.config.interpolation)


def draw_keys(fingerprint: Fingerprint, source: ImageSource, draws: int) -> list[str]:
    """Keys of the bank, one a draw. A larger bank begins with the smaller one."""
    return [image_key(fingerprint, source.identity, source.size, number) for number in range(draws)]


def clean_key(fingerprint: Fingerprint, source: ImageSource) -> str:
    """Key of the image without noise, as inference sees it; for validation."""
    return image_key(fingerprint, source.identity, source.size, None)


@dataclass(frozen=True)
class Draw:
    """The random numbers of one draw of the bank; of ``number`` None, those of the image without noise.

    Attributes:
        noise: float32 ``[1, 3, 1, H, W]`` of deviation 1, to be scaled by ``sigma``.
        seed: All of them come from it, also those that ``random`` gives next, for the posterior.
    """

    number: int | None
    sigma: float
    noise: torch.Tensor | None
    random: torch.Generator
    seed: int


def make_draw(source: ImageSource, number: int | None, image_hwc: torch.Tensor) -> Draw:
    """Draw what depends on the picture's name, ``number`` and the picture's shape alone."""
    purpose = ("image", source.identity, "clean" if number is None else number)
    random, seed = generator(*purpose), seed_for(*purpose)
    if number is None:
        return Draw(None, 0.0, None, random, seed)
    sigma = math.exp(SIGMA_LOG_MEAN + SIGMA_LOG_STD * float(torch.randn((), generator=random)))
    height, width, channels = image_hwc.shape
    return Draw(number, sigma, torch.randn(1, channels, 1, height, width, generator=random), random, seed)


def start_draw(
    vae: FrozenVae, image_hwc: torch.Tensor, draw: Draw, source: ImageSource, key: str
) -> Callable[[], Entry]:
    """Begin to encode one draw of the bank; what is returned waits for it and makes its entry.

    The entry is ``{"latents": [C, 1, H/8, W/8]}``, unscaled; sigma and seed are in the facts. Draws are not put
    through the VAE in batches: that is no faster, and the last bits of a row may depend on its batch.

    Args:
        image_hwc: uint8 ``[H, W, 3]``.

    Raises:
        VideoError: from the call that makes the entry, if the VAE's output is not finite.
    """
    pixels = to_pixels(image_hwc[None, None])
    if draw.noise is not None:
        pixels = pixels + draw.sigma * draw.noise
    facts = {
        "source": source.name,
        "image": source.identity,
        "size": str(source.size),
        "draw": draw.number,
        "sigma": draw.sigma,
        "seed": draw.seed,
    }
    running, random = vae.start_pixels(pixels), draw.random
    return lambda: Entry(key, {"latents": _sample(running.result()[0], random)}, facts)


def _sample(moments_cfhw: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    """A draw from the posterior, as diffusers' ``DiagonalGaussianDistribution`` makes it, in the moments' dtype."""
    mean, logvar = moments_cfhw.float().chunk(2)
    spread = torch.exp(0.5 * logvar.clamp(-30.0, 20.0))
    latents = (mean + spread * torch.randn(mean.shape, generator=random)).to(moments_cfhw.dtype)
    if not torch.isfinite(latents).all():
        raise VideoError("the VAE gave values that are not finite; try --vae-dtype float32")
    return latents.contiguous()
