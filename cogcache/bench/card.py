"""A smaller GPU than the one there is: to see what would run on it."""

from __future__ import annotations

import torch

from cogcache.errors import ConfigError

__all__ = ["cap_gpu_memory"]


def cap_gpu_memory(gib: float | None) -> None:
    """Let torch take no more than ``gib`` GiB of each GPU in this process; what needs more fails as on such a card.

    What CUDA itself takes, some 0.5 GiB, is not in it. None changes nothing.

    Raises:
        ConfigError: if a GPU has less, or there is none.
    """
    if gib is None:
        return
    if not torch.cuda.is_available():
        raise ConfigError("--gpu-memory limits a GPU, and there is none.")
    for number in range(torch.cuda.device_count()):
        there = torch.cuda.get_device_properties(number).total_memory / 2**30
        if gib > there:
            raise ConfigError(f"--gpu-memory {gib:g}: the GPU has {there:.1f} GiB.")
        torch.cuda.set_per_process_memory_fraction(gib / there, number)
