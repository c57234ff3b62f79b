"""Rotary position tables, by the rule of the stock pipelines at every size.

CogVideoX 1.0 stretches the default grid over the current one (resize and crop, then evenly spaced
positions); 1.5 takes the corner of the default grid (``slice``). Models with added positions (sincos) get
none: the transformer adds them itself. Follows ``_prepare_rotary_positional_embeddings`` of diffusers'
    ``CogVideoXPipeline``,
which is not imported here because its module brings the VAE and T5 along.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from torch import Tensor

from cogcache.errors import GeometryError
from cogcache.geometry import Size
from cogcache.variants import Variant

__all__ = ["rotary_tables"]

Corner = tuple[int, int]


@lru_cache(maxsize=32)
@torch.inference_mode(False)  # remembered tables must stay usable in training, whoever asked first
def rotary_tables(
    variant: Variant, frames: int, height: int, width: int, device: torch.device
) -> tuple[Tensor, Tensor] | None:
    """Cosine and sine tables, float32 [frames x height x width in patches, head dim], or None without RoPE.

    Args:
        frames: Latent frames, padding included.
        height: Latent height (pixels / 8).
        width: Latent width.

    Raises:
        GeometryError: if a 1.5 model is given a larger grid than it has positions for.
    """
    if variant.positions == "sincos":
        return None
    grid = (height // variant.patch_size, width // variant.patch_size)
    base = (variant.sample_height // variant.patch_size, variant.sample_width // variant.patch_size)
    tables: tuple[Tensor, Tensor]
    if variant.patch_size_t is None:
        tables = get_3d_rotary_pos_embed(
            embed_dim=variant.attention_head_dim,
            crops_coords=_crop_region(grid, base),
            grid_size=grid,
            temporal_size=frames,
            device=device,
        )
    else:
        _check_slice(grid, base, variant)
        tables = get_3d_rotary_pos_embed(
            embed_dim=variant.attention_head_dim,
            crops_coords=None,
            grid_size=grid,
            temporal_size=-(-frames // variant.patch_size_t),
            grid_type="slice",
            max_size=base,
            device=device,
        )
    return tables


def _crop_region(grid: Corner, base: Corner) -> tuple[Corner, Corner]:
    """Top-left and bottom-right corner of ``grid`` fitted into ``base`` with its aspect ratio, centred.

    Rounds where the pipeline rounds (half to even), so that positions agree to the bit.
    """
    (height, width), (base_height, base_width) = grid, base
    if height / width > base_height / base_width:
        fitted = (base_height, round(base_height / height * width))
    else:
        fitted = (round(base_width / width * height), base_width)
    top = round((base_height - fitted[0]) / 2.0)
    left = round((base_width - fitted[1]) / 2.0)
    return (top, left), (top + fitted[0], left + fitted[1])


def _check_slice(grid: Corner, base: Corner, variant: Variant) -> None:
    if grid[0] > base[0] or grid[1] > base[1]:
        size = Size(grid[0] * variant.size_multiple, grid[1] * variant.size_multiple)
        raise GeometryError(
            f"this model has positions for pictures up to {variant.default_size}, not for {size}.",
            "Encode at a smaller size.",
        )
