"""The two forms in which a latent entry holds its posterior: in full, or with 8 bits for each log-variance.

``moments`` is what the VAE gives, mean then log-variance, in its dtype. ``moments_8bit`` holds the same means bit for
bit, low bytes and high bytes apart since these compress better, and codes of the log-variances: :func:`pack_moments`.

A code is off by half a step of 50/255 at most, so the posterior's standard deviation is by a factor within
exp(+-25/510): 5.1% at most, 2.8% in the root mean square.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import torch

__all__ = [
    "LOGVAR_RANGE",
    "LOGVAR_SLACK",
    "MOMENTS",
    "MOMENTS_8BIT",
    "PACKED_DTYPES",
    "moments_of",
    "pack_moments",
    "unpack_moments",
]

MOMENTS: Final = "moments"
MOMENTS_8BIT: Final = "moments_8bit"
LOGVAR_RANGE: Final = (-30.0, 20.0)
"""Clamp of the log-variance, as in diffusers' ``DiagonalGaussianDistribution``."""
PACKED_DTYPES: Final = ("bfloat16", "float16")
"""Dtypes of the VAE for which there is the form with 8 bits."""

_STEP: Final = (LOGVAR_RANGE[1] - LOGVAR_RANGE[0]) / 255
LOGVAR_SLACK: Final = _STEP / 2
"""How far at most a log-variance of 8 bits is from the clamped one."""


def pack_moments(moments: torch.Tensor) -> torch.Tensor:
    """Posterior moments with 8 bits for each log-variance, uint8 [3C, F, H, W].

    Channels are the low bytes of the means, their high bytes, and codes k: log-variance -30 + k * 50/255, the nearest
    to the one clamped to [-30, 20].

    Args:
        moments: [2C, F, H, W], mean then log-variance, finite, bfloat16 or float16.

    Raises:
        ValueError: if they are of another dtype.
    """
    import torch

    if str(moments.dtype).removeprefix("torch.") not in PACKED_DTYPES:
        raise ValueError(f"only moments of 16 bits can be packed, not {moments.dtype}")
    mean, logvar = moments.chunk(2)
    bytes_ = mean.reshape(-1).view(torch.uint8).reshape(*mean.shape, 2)
    codes = (logvar.float().clamp(*LOGVAR_RANGE) - LOGVAR_RANGE[0]).div(_STEP).round().to(torch.uint8)
    return torch.cat([bytes_[..., 0], bytes_[..., 1], codes])


def unpack_moments(packed: torch.Tensor, dtype: str) -> torch.Tensor:
    """What :func:`pack_moments` made, as float32 [2C, F, H, W]: means exact, log-variances within ``LOGVAR_SLACK``.

    Args:
        packed: uint8 [3C, F, H, W].
        dtype: That of the means: ``bfloat16`` or ``float16``.

    Raises:
        ValueError: if it is not of that form.
    """
    import torch

    if dtype not in PACKED_DTYPES:
        raise ValueError(f"packed moments are of 16 bits, not {dtype}")
    if packed.dtype != torch.uint8 or packed.ndim != 4 or len(packed) % 3:
        raise ValueError(f"packed moments are uint8 [3C, F, H, W], not {packed.dtype} {list(packed.shape)}")
    low, high, codes = packed.chunk(3)
    mean = torch.stack([low, high], -1).view(getattr(torch, dtype)).squeeze(-1)
    return torch.cat([mean.float(), codes.float() * _STEP + LOGVAR_RANGE[0]])


def moments_of(tensors: Mapping[str, torch.Tensor], dtype: object) -> torch.Tensor:
    """Posterior moments [2C, F, H, W] of a latent entry in either form; float32 where they were packed.

    Args:
        dtype: Field ``vae_dtype`` of the fingerprint; only packed moments need it.

    Raises:
        ValueError: if the entry holds none.
    """
    if MOMENTS in tensors:
        return tensors[MOMENTS]
    if MOMENTS_8BIT in tensors:
        return unpack_moments(tensors[MOMENTS_8BIT], str(dtype))
    raise ValueError(f"it holds no moments, but {sorted(tensors)}")
