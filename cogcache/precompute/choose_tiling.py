"""Whether the VAE encodes in tiles: only where a whole picture, and the clips that wait for their turn, do not fit."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from cogcache.geometry import Bucket
from cogcache.models import torch_dtype
from cogcache.precompute.fused import has_kernels
from cogcache.precompute.stages import RESULTS_WAITING

__all__ = ["choose_tiling", "must_tile", "untiled_bytes"]

# Peak of untiled bf16 encoding at 480x720 whatever the frame count, since the encoder works through 8 frames at a
# time: with our kernels and with diffusers' encoder. Measured on an H200 (benchmarks/records/2026-11-22-encoding.md).
_BYTES_PER_PIXEL = {True: 6.4 * 2**30 / (480 * 720), False: 8.5 * 2**30 / (480 * 720)}


def choose_tiling(wanted: str, buckets: Sequence[Bucket], dtype: str, device: torch.device) -> bool:
    """Decide ``--tiling``: ``auto`` tiles only where some bucket would not fit the free GPU memory untiled."""
    if wanted != "auto":
        return wanted == "on"
    if device.type != "cuda":
        return False
    free, _ = torch.cuda.mem_get_info(device)
    return must_tile(buckets, dtype, free, kernels=has_kernels(device))


def must_tile(buckets: Iterable[Bucket], dtype: str, free: int, *, kernels: bool) -> bool:
    """Whether clips of some bucket would not fit into ``free`` bytes of GPU memory untiled; ``kernels`` as below."""
    return max(untiled_bytes(bucket, dtype, kernels=kernels) for bucket in buckets) > free


def untiled_bytes(bucket: Bucket, dtype: str, *, kernels: bool) -> float:
    """What encoding clips of ``bucket`` one after the other takes of a GPU.

    Beside what the encoder works with there are the clip's pixels in ``dtype``, and the bytes of the clips that have
    been sent ahead.

    Args:
        kernels: Whether the encoder is ours.
    """
    itemsize = torch_dtype(dtype).itemsize
    working = _BYTES_PER_PIXEL[kernels] * bucket.height * bucket.width * itemsize / 2
    return working + 3 * bucket.volume * (itemsize + RESULTS_WAITING + 1)
