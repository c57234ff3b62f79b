"""Latents to pictures, by the VAE's decoder alone, as the stock pipelines decode.

A leaf that both training (for its sample videos) and others may use; diffusers' VAE is imported only when a
decoder is opened.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cogcache.errors import ModelError
from cogcache.geometry import Size
from cogcache.models import loading
from cogcache.tiling import set_decode_tiling

__all__ = ["Decoder", "check_decoder", "open_decoder"]


def check_decoder(root: Path) -> None:
    """Find out early whether :func:`open_decoder` will find weights.

    Raises:
        ModelError: if there are none.
    """
    if not any((root / "vae").glob("*.safetensors")):
        raise ModelError(
            f"{root / 'vae'} has no .safetensors weights, which sample videos need.",
            "Fetch the whole checkpoint, or train with --no-sample-videos.",
        )


class Decoder:
    """The decoder of ``AutoencoderKLCogVideoX``; see :func:`open_decoder`."""

    def __init__(self, root: Path, dtype: torch.dtype, device: torch.device, size: Size) -> None:
        from diffusers.models.autoencoders.autoencoder_kl_cogvideox import AutoencoderKLCogVideoX

        with loading("VAE", root):
            vae: Any = AutoencoderKLCogVideoX.from_pretrained(
                root / "vae", torch_dtype=dtype, use_safetensors=True, local_files_only=True
            )
        vae.encoder = None
        set_decode_tiling(vae, size)
        self._vae = vae.eval().requires_grad_(False).to(device)
        self._dtype, self._device = dtype, device

    @torch.no_grad()
    def decode(self, latents_fchw: Tensor) -> npt.NDArray[np.uint8]:
        """Decode one video.

        Args:
            latents_fchw: Scaled latents as the transformer denoises them, without padding frames.

        Returns:
            RGB frames [F, H, W, 3].
        """
        latents_bcfhw = latents_fchw[None].to(self._device, self._dtype).permute(0, 2, 1, 3, 4)
        pixels_cfhw = self._vae.decode(1 / self._vae.config.scaling_factor * latents_bcfhw).sample[0]
        unit_fhwc = (pixels_cfhw * 0.5 + 0.5).clamp(0, 1).permute(1, 2, 3, 0).float().cpu().numpy()
        return np.asarray((np.nan_to_num(unit_fhwc) * 255).round(), dtype=np.uint8)


@contextmanager
def open_decoder(root: Path, dtype: torch.dtype, device: torch.device, size: Size) -> Iterator[Decoder]:
    """A decoder for videos of ``size``, on the device only within the context; tiled where larger than a tile.

    Args:
        root: Local checkpoint folder.
        dtype: Of weights and decoding.

    Raises:
        ModelError: if its weights are missing or damaged.
    """
    _free(device)
    decoder = Decoder(root, dtype, device, size)
    try:
        yield decoder
    finally:
        del decoder._vae
        _free(device)


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
