"""The frozen VAE: fitted frames in, unscaled posterior moments out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from cogcache.cache.format import SCHEMA, Fingerprint
from cogcache.errors import GeometryError, ModelError
from cogcache.geometry import Size
from cogcache.hashing import weights_sha256
from cogcache.models import loading, torch_dtype
from cogcache.precompute.components import config_digest
from cogcache.precompute.fast_encoder import FastEncoder, can_take_over
from cogcache.precompute.fused import has_kernels
from cogcache.precompute.lane import Lane, Running
from cogcache.variants import read_config

__all__ = ["FrozenVae", "to_pixels", "vae_fingerprint"]


def vae_fingerprint(root: Path, dtype: str, *, tiled: bool) -> Fingerprint:
    """What of the VAE determines the bytes of a latent: weights, config, precision, tiling."""
    folder = root / "vae"
    return {
        "schema": SCHEMA,
        "vae_weights": weights_sha256(folder),
        "vae_config": config_digest(root, "vae"),
        "vae_dtype": dtype,
        "vae_tiling": _tiling_text(read_config(root, "vae/config.json")) if tiled else "off",
        "vae_frame_batch": 8,
    }


def _tiling_text(config: dict[str, Any]) -> str:
    # AutoencoderKLCogVideoX tiles at half its own sample size, overlapping by 1/6 and 1/5.
    return f"{config.get('sample_height', 480) // 2}x{config.get('sample_width', 720) // 2} overlap 1/6 1/5"


class FrozenVae:
    """``AutoencoderKLCogVideoX`` for encoding alone: no gradient, decoder dropped.

    Args:
        root: Local checkpoint folder.
        dtype: ``float32``, ``bfloat16`` or ``float16``: precision of the weights and of the moments.
        tiled: Encode in overlapping tiles.
        device: Where to run.
    """

    def __init__(self, root: Path, dtype: str, *, tiled: bool, device: torch.device) -> None:
        from diffusers import AutoencoderKLCogVideoX

        with loading("VAE", root):
            vae = AutoencoderKLCogVideoX.from_pretrained(
                root / "vae", torch_dtype=torch_dtype(dtype), use_safetensors=True, local_files_only=True
            )
        vae.decoder = None
        vae.requires_grad_(False)
        vae.enable_slicing()
        if tiled:
            vae.enable_tiling()
        self._vae = vae.eval().to(device)
        if has_kernels(device) and can_take_over(vae.encoder):
            self._vae.encoder = FastEncoder(vae.encoder)
        self.dtype = torch_dtype(dtype)
        self.device = device
        self._lane = Lane(device)

    def check_size(self, size: Size) -> None:
        """Refuse picture sizes for which diffusers' tiles do not add up to the whole latent.

        Raises:
            GeometryError: if tiling is on and would give a latent of a wrong shape.
        """
        vae = self._vae
        if not vae.use_tiling or not self._is_tiled(size):
            return
        for length, tile, overlap in (
            (size.height, vae.tile_sample_min_height, vae.tile_overlap_factor_height),
            (size.width, vae.tile_sample_min_width, vae.tile_overlap_factor_width),
        ):
            if not _tiles_add_up(length, tile, overlap):
                raise GeometryError(
                    f"{size} cannot be encoded in tiles of {tile} pixels: they do not add up.",
                    "Use --tiling off.",
                )

    def _is_tiled(self, size: Size) -> bool:
        vae = self._vae
        return bool(size.height > vae.tile_sample_min_height or size.width > vae.tile_sample_min_width)

    def encode(self, frames_bfhwc: torch.Tensor) -> torch.Tensor:
        """:meth:`start`, and its result."""
        return self.start(frames_bfhwc).result()

    @torch.inference_mode()
    def start(self, frames_bfhwc: torch.Tensor) -> Running:
        """Begin to encode clips; on a GPU, return before they are done.

        Args:
            frames_bfhwc: uint8 ``[B, F, H, W, 3]``, F = 8N+1, on any device.

        Returns:
            What gives moments ``[B, 2C, F', H/8, W/8]`` on the CPU in the VAE's dtype: mean, then log-variance,
            unscaled.

        Raises:
            ModelError: if the GPU's memory is too small.
        """
        with _enough_memory():
            return self._start(to_pixels(self._lane.upload(frames_bfhwc)).to(self.dtype))

    @torch.inference_mode()
    def start_pixels(self, pixels_bcfhw: torch.Tensor) -> Running:
        """Begin to encode pixels ``[B, 3, F, H, W]`` in -1..1 (float32), as :meth:`start`."""
        with _enough_memory():
            return self._start(self._lane.upload(pixels_bcfhw).to(self.dtype))

    def _start(self, inputs_bcfhw: torch.Tensor) -> Running:
        begun = self._lane.mark()
        moments: torch.Tensor = self._vae.encode(inputs_bcfhw).latent_dist.parameters
        return self._lane.download(moments, begun)

    @property
    def busy_s(self) -> float:
        """Time that the GPU has spent on encoding, of all results that were taken; 0 on a CPU."""
        return self._lane.busy_s


@contextmanager
def _enough_memory() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        raise ModelError(
            "the GPU's memory is too small for the VAE at this size.", "Use --tiling on."
        ) from None


def to_pixels(frames_bfhwc: torch.Tensor) -> torch.Tensor:
    """uint8 ``[B, F, H, W, 3]`` to float32 ``[B, 3, F, H, W]`` in -1..1, as diffusers' VideoProcessor scales."""
    return frames_bfhwc.permute(0, 4, 1, 2, 3).to(torch.float32).div_(255.0).mul_(2.0).sub_(1.0)


def _tiles_add_up(length: int, tile: int, overlap: float) -> bool:
    """Whether ``AutoencoderKLCogVideoX.tiled_encode`` returns all latent rows (or columns) of ``length`` pixels.

    It cuts a tile every ``tile * (1 - overlap)`` pixels and keeps of each latent tile at most what does not
    overlap the next. A last tile of under 8 pixels does not even get through the encoder.
    """
    latent_tile = tile // 8
    limit = latent_tile - int(latent_tile * overlap)
    step = int(tile * (1 - overlap))
    tiles = [min(tile, length - start) // 8 for start in range(0, length, step)]
    return min(tiles) > 0 and sum(min(limit, rows) for rows in tiles) == length // 8
