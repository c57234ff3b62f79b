"""How torch takes memory: on a GPU, and page-locked on its host, which the GPU copies from and to on its own.

Page-locked memory is rounded up to a power of two, piece by piece. So buffers of one size are taken several at a time,
in slabs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = [
    "host_memory",
    "locked_size",
    "pool_size",
    "slab",
    "slab_count",
    "slab_counts",
    "slabs_size",
]

_MOST, _GOOD = 16, 0.9
_LARGEST = 2 << 30


def host_memory(size: int, device: torch.device) -> Tensor:
    """``size`` bytes of host memory, page-locked for copies to and from ``device`` where that is a GPU."""
    return torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")


def locked_size(size: int) -> int:
    """What torch takes for ``size`` bytes of page-locked memory: the next power of two (``CachingHostAllocator.h``)."""
    return 1 << max(size - 1, 0).bit_length()


def slab(size: int, count: int, take: Callable[[int], Tensor]) -> list[Tensor]:
    """``count`` buffers of ``size`` bytes out of one piece, which ``take`` gives."""
    flat = take(count * size)
    return [flat[place * size : (place + 1) * size] for place in range(count)]


def slab_count(size: int) -> int:
    """How many buffers of ``size`` bytes are taken at once, so that little is lost to powers of two."""
    used = {count: count * size / locked_size(count * size) for count in range(1, _MOST + 1)}
    return next((count for count in used if used[count] >= _GOOD), max(used, key=lambda count: used[count]))


def pool_size(size: int, buffers: int) -> int:
    """What buffers of ``size`` bytes take on a GPU's host where it is not known beforehand how many there will be."""
    count = slab_count(size)
    return -(-buffers // count) * locked_size(count * size)


def slab_counts(size: int, buffers: int) -> list[int]:
    """How ``buffers`` of ``size`` bytes are dealt to slabs, of at most 2 GiB, so that they take the least together."""
    most = max(1, min(_MOST, buffers, _LARGEST // size))
    return min(
        (_dealt(buffers, count) for count in range(1, most + 1)), key=lambda counts: _together(size, counts)
    )


def slabs_size(size: int, buffers: int) -> int:
    """What those take on a GPU's host."""
    return _together(size, slab_counts(size, buffers))


def _dealt(buffers: int, count: int) -> list[int]:
    whole, rest = divmod(buffers, count)
    return [count] * whole + [rest] * bool(rest)


def _together(size: int, counts: Sequence[int]) -> int:
    return sum(locked_size(count * size) for count in counts)
