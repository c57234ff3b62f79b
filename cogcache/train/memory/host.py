"""Tensors kept in page-locked host memory between forward and backward pass, copied on streams of their own.

The device never waits for a copy out; a copy in is started one block ahead. On a CPU all of it is plain copying.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cogcache.allocator import host_memory, slab, slab_count
from cogcache.streamed import CopyStreams

__all__ = ["COPIES_SHARE", "HostPool", "Kept"]

COPIES_SHARE = 0.5
"""Of the free host memory, what copies of a checkpoint may take; see :class:`~cogcache.train.saver.HostCopies`."""


@dataclass
class Kept:
    """A tensor in host memory, or on its way there or back."""

    buffer: Tensor
    size: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    done: Any = None
    fetched: Tensor | None = None


class HostPool:
    """Buffers that are reused, by size; one is given out again only after all copies that touch it.

    Args:
        least: Bytes of a buffer at least: with that of the largest tensors, batches of all shapes share the buffers.
    """

    def __init__(self, streams: CopyStreams, least: int = 0) -> None:
        self.streams, self.least = streams, least
        self._free: dict[int, list[tuple[Tensor, Any]]] = {}
        self.bytes = 0

    def put(self, tensor: Tensor) -> Kept:
        """Copy a tensor to the host. The caller may let go of it at once."""
        count = tensor.numel() * tensor.element_size()
        buffer, free = self._take(count)
        dense = torch.empty_like(tensor, device="meta").stride()  # a slice comes back without its gaps
        kept = Kept(buffer, tensor.shape, dense, tensor.dtype)
        with self.streams.on(self.streams.out):
            self.streams.wait(free)
            self._view(kept).copy_(tensor, non_blocking=True)
            kept.done = self.streams.mark()
            if self.streams.out is not None:
                tensor.record_stream(self.streams.out)
        return kept

    def fetch(self, kept: Kept) -> None:
        """Start the copy back to the device; the current stream goes on."""
        if kept.fetched is not None:
            return
        fetched = torch.empty_strided(kept.size, kept.stride, dtype=kept.dtype, device=self.streams.device)
        with self.streams.on(self.streams.back):
            self.streams.wait(kept.done)
            fetched.copy_(self._view(kept), non_blocking=True)
            kept.done = self.streams.mark()
            if self.streams.back is not None:
                fetched.record_stream(self.streams.back)
        kept.fetched = fetched

    def get(self, kept: Kept) -> Tensor:
        """The tensor on the device again; its buffer is free from here on."""
        self.fetch(kept)
        self.streams.wait(kept.done)
        tensor, kept.fetched = kept.fetched, None
        self._free.setdefault(len(kept.buffer), []).append((kept.buffer, kept.done))
        assert tensor is not None
        return tensor

    def _take(self, count: int) -> tuple[Tensor, Any]:
        count = max(count, self.least)
        free = self._free.setdefault(count, [])
        if not free:
            free += [(buffer, None) for buffer in self._slab(count)]
        return free.pop(0)

    def _slab(self, size: int) -> list[Tensor]:
        count = slab_count(size) if self.streams.cuda else 1
        self.bytes += count * size
        return slab(size, count, lambda together: host_memory(together, self.streams.device))

    @staticmethod
    def _view(kept: Kept) -> Tensor:
        return kept.buffer.view(kept.dtype).as_strided(kept.size, kept.stride)
