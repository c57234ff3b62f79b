"""Frozen weights of the blocks in host memory, streamed to the device one block ahead.

Each block's frozen parameters lie in one flat page-locked buffer. The device has two buffers of that size: the block at
work uses one while the next block's weights arrive in the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cogcache.train.memory.host import CopyStreams, host_memory

__all__ = ["StreamedWeights"]

_ALIGN = 256
_SLOTS = 2


class StreamedWeights:
    """Takes the frozen parameters of ``blocks``, which must all be alike, off the device.

    Outside of :meth:`enter` and :meth:`leave` the parameters are on the host.
    """

    def __init__(self, blocks: Sequence[nn.Module], streams: CopyStreams) -> None:
        self.streams = streams
        self._parameters = [[p for p in block.parameters() if not p.requires_grad] for block in blocks]
        self._places, size = _layout(self._parameters[0])
        self._host: list[Tensor] = []
        for index, parameters in enumerate(self._parameters):
            self._host.append(_gather(parameters, self._places, host_memory(size, streams.device)))
            self._point(
                index, self._host[index]
            )  # block by block, so that no weight is twice on the host for long
        self._slots = [torch.empty(size, dtype=torch.uint8, device=streams.device) for _ in range(_SLOTS)]
        self._holds: list[int | None] = [None] * _SLOTS
        self._loaded: list[Any] = [None] * _SLOTS
        self._unused: list[Any] = [None] * _SLOTS
        self.bytes = size * len(blocks)

    def enter(self, index: int, following: int) -> None:
        """Let block ``index`` use its weights on the device, and start on those of the block that follows."""
        slot = self._load(index, keep=None)
        self.streams.wait(self._loaded[slot])
        self._point(index, self._slots[slot])
        if 0 <= following < len(self._host):
            self._load(following, keep=slot)

    def leave(self, index: int) -> None:
        """The block's work has been given to the device."""
        slot = self._holds.index(index)
        self._unused[slot] = self.streams.mark()
        self._point(index, self._host[index])

    def _load(self, index: int, keep: int | None) -> int:
        if index in self._holds:
            return self._holds.index(index)
        slot = next(number for number in range(_SLOTS) if number != keep)
        stream = self.streams.back
        if stream is not None:
            if self._unused[slot] is not None:
                stream.wait_event(self._unused[slot])
            with torch.cuda.stream(stream):
                self._slots[slot].copy_(self._host[index], non_blocking=True)
                self._loaded[slot] = stream.record_event()
        else:
            self._slots[slot].copy_(self._host[index])
        self._holds[slot] = index
        return slot

    def _point(self, index: int, flat: Tensor) -> None:
        for parameter, (start, count) in zip(self._parameters[index], self._places, strict=True):
            parameter.data = flat[start : start + count].view(parameter.dtype).view(parameter.shape)


def _layout(parameters: Sequence[nn.Parameter]) -> tuple[list[tuple[int, int]], int]:
    """Where each parameter lies in a flat buffer, as (start, bytes), and the size of it."""
    places, end = [], 0
    for parameter in parameters:
        count = parameter.numel() * parameter.element_size()
        places.append((end, count))
        end += -(-count // _ALIGN) * _ALIGN
    return places, end


def _gather(parameters: Sequence[nn.Parameter], places: Sequence[tuple[int, int]], flat: Tensor) -> Tensor:
    for parameter, (start, count) in zip(parameters, places, strict=True):
        flat[start : start + count].view(parameter.dtype).view(parameter.shape).copy_(parameter.data)
    return flat
