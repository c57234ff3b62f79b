"""When the VAE's decoder may work in tiles, and when its tiles would not join."""

from __future__ import annotations

import logging
from typing import Any

from cogcache.geometry import Size

__all__ = ["set_decode_tiling", "tiles_join"]

_log = logging.getLogger(__name__)


def set_decode_tiling(vae: Any, size: Size) -> None:
    """Decode videos of ``size`` in tiles where they are larger than one tile and the tiles join; else whole."""
    tile = (vae.tile_sample_min_height, vae.tile_sample_min_width)
    if size.height <= tile[0] and size.width <= tile[1]:
        return
    if tiles_join(vae):
        vae.enable_tiling()
    else:
        _log.warning("This VAE's tiles of %dx%d do not join without gaps; decoding whole pictures.", *tile)


def tiles_join(vae: Any) -> bool:
    """Whether the tiled decoder of ``AutoencoderKLCogVideoX`` returns the size it should.

    It steps by whole latent pixels but cuts tiles in picture pixels. Both are rounded and agree only for some
    tile sizes, the real models' 240x360 among them.
    """
    sides = (
        (vae.tile_latent_min_height, vae.tile_sample_min_height, vae.tile_overlap_factor_height),
        (vae.tile_latent_min_width, vae.tile_sample_min_width, vae.tile_overlap_factor_width),
    )
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    return all(
        int(latent * (1 - overlap)) * factor == pixels - int(pixels * overlap)
        for latent, pixels, overlap in sides
    )
