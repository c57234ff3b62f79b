"""Tensors kept in page-locked host memory between forward and backward pass, copied on streams of their own.

The device never waits for a copy out; a copy in is started one block ahead. On a CPU all of it is plain copying.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cogcache.streamed import CopyStreams, host_memory

__all__ = ["CopyStreams", "HostPool", "Kept", "host_memory"]


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
    """Buffers that are reused, by size; one is given out again only after all copies that touch it."""

    def __init__(self, streams: CopyStreams) -> None:
        self.streams = streams
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
        free = self._free.get(count)
        if free:
            return free.pop(0)
        self.bytes += count
        return host_memory(count, self.streams.device), None

    @staticmethod
    def _view(kept: Kept) -> Tensor:
        return kept.buffer.view(kept.dtype).as_strided(kept.size, kept.stride)
