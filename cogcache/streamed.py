"""Frozen weights of blocks that are on the device only while their block is at work, brought there one block ahead.

Each block's frozen parameters lie in one flat buffer, in page-locked host memory or, in 8 bits, on the device itself.
Beside it the device has two buffers with room for a block's weights as it computes with them: the block at work uses
one while the next block's weights arrive in the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from cogcache.allocator import host_memory, slab, slab_counts
from cogcache.int8 import Int8, int8_size, no_values, values_of

__all__ = ["CopyStreams", "StreamedWeights", "move_without"]

_ALIGN = 256
_SLOTS = 2
_THREADS = 4
_Place = tuple[int, int]


class CopyStreams:
    """One stream for copies to the host and one for copies to the device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cuda = device.type == "cuda"
        stream: Any = torch.cuda.Stream
        self.out: torch.cuda.Stream | None = stream(device) if self.cuda else None
        self.back: torch.cuda.Stream | None = stream(device) if self.cuda else None

    def on(self, stream: torch.cuda.Stream | None) -> AbstractContextManager[Any]:
        """Do what is inside on ``stream``, after all that the current stream has been given so far."""
        if stream is None:
            return nullcontext()
        stream.wait_stream(torch.cuda.current_stream(self.device))
        return torch.cuda.stream(stream)

    def mark(self) -> torch.cuda.Event | None:
        """An event at this point of the current stream."""
        return torch.cuda.current_stream(self.device).record_event() if self.cuda else None

    def wait(self, event: torch.cuda.Event | None) -> None:
        """Let the current stream wait for an event."""
        if event is not None:
            torch.cuda.current_stream(self.device).wait_event(event)


def move_without(module: nn.Module, parameters: Sequence[nn.Parameter], device: torch.device) -> None:
    """Put ``module`` on ``device``, but leave the data of ``parameters`` where they are."""
    there = [parameter.data for parameter in parameters]
    for parameter in parameters:
        parameter.data = parameter.data.new_empty(0)
    module.to(device)
    for parameter, data in zip(parameters, there, strict=True):
        parameter.data = data


class StreamedWeights:
    """Takes frozen parameters of blocks, which must all be alike, off the device.

    Outside of :meth:`enter` and :meth:`leave` the parameters are where they are kept; those in 8 bits hold NaN.

    Args:
        parameters: Those of each block, in the order in which blocks run. Those that
            :func:`~cogcache.int8.put_in_int8` was given are kept in 8 bits.
        on_device: Keep the blocks' buffers on the device.
    """

    def __init__(
        self,
        parameters: Sequence[Sequence[nn.Parameter]],
        streams: CopyStreams,
        *,
        on_device: bool = False,
    ) -> None:
        self.streams = streams
        self._parameters = parameters
        self._packing = _Packing(parameters[0])
        size = self._packing.size
        take = self._on_device if on_device else self._on_host
        counts = slab_counts(size, len(parameters))
        # Locking pages takes as long as filling them; but little shall be there twice.
        with ThreadPoolExecutor(max(1, _THREADS // counts[0])) as pool:
            ends = [sum(counts[: number + 1]) for number in range(len(counts))]
            slabs = pool.map(lambda end, count: self._take_in(range(end - count, end), take), ends, counts)
            self._kept = [flat for buffers in slabs for flat in buffers]
        if on_device and streams.cuda:  # what was packed there is read on another stream
            torch.cuda.synchronize(streams.device)
        self._arriving = None if on_device or not streams.cuda else self._packing.arrivals(streams.device)
        self._slots = [self._on_device(self._packing.slot_size) for _ in range(_SLOTS)]
        self._holds: list[int | None] = [None] * _SLOTS
        self._loaded: list[Any] = [None] * _SLOTS
        self._unused: list[Any] = [None] * _SLOTS
        self.bytes = size * len(parameters)

    def _on_host(self, size: int) -> Tensor:
        return host_memory(size, self.streams.device)

    def _on_device(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, device=self.streams.device)

    def _take_in(self, indices: Sequence[int], take: Callable[[int], Tensor]) -> list[Tensor]:
        """Move some blocks' parameters into buffers; at once, so that only some blocks are there twice."""
        with torch.cuda.device(self.streams.device) if self.streams.cuda else nullcontext():
            buffers = slab(self._packing.size, len(indices), take)
            for index, flat in zip(indices, buffers, strict=True):
                self._packing.pack(self._parameters[index], flat)
        return buffers

    def enter(self, index: int, following: int) -> None:
        """Let block ``index`` use its weights on the device, and start on those of the block that follows."""
        slot = self._load(index, keep=None)
        self.streams.wait(self._loaded[slot])
        self._packing.point(self._parameters[index], self._slots[slot])
        if 0 <= following < len(self._kept):
            self._load(following, keep=slot)

    def leave(self, index: int) -> None:
        """The block's work has been given to the device."""
        slot = self._holds.index(index)
        self._unused[slot] = self.streams.mark()
        self._packing.point_back(self._parameters[index], self._kept[index])

    def _load(self, index: int, keep: int | None) -> int:
        if index in self._holds:
            return self._holds.index(index)
        slot = next(number for number in range(_SLOTS) if number != keep)
        stream = self.streams.back
        if stream is not None:
            if self._unused[slot] is not None:
                stream.wait_event(self._unused[slot])
            with torch.cuda.stream(stream):
                self._unpack(index, slot)
                self._loaded[slot] = stream.record_event()
        else:
            self._unpack(index, slot)
        self._holds[slot] = index
        return slot

    def _unpack(self, index: int, slot: int) -> None:
        flat = self._kept[index]
        if self._arriving is not None:  # one is enough: one stream fills and empties it
            flat = self._arriving.copy_(flat, non_blocking=True)
        self._packing.unpack(flat, self._slots[slot])


class _Packing:
    """How the parameters of one block lie in the buffer that is kept, and in a slot on the device.

    Args:
        parameters: Of any of the blocks.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._in_8_bits = [values_of(parameter) is not None for parameter in parameters]
        self._shapes = [(parameter.shape, parameter.dtype) for parameter in parameters]
        self._slot, self.slot_size = _layout(p.numel() * p.element_size() for p in parameters)
        sizes = [
            int8_size(parameter) if in_8_bits else (place[1], 0)
            for parameter, in_8_bits, place in zip(parameters, self._in_8_bits, self._slot, strict=True)
        ]
        places, self.size = _layout(size for pair in sizes for size in pair)
        self._kept = list(zip(places[::2], places[1::2], strict=True))

    def arrivals(self, device: torch.device) -> Tensor | None:
        """Where a block's buffer arrives on the device before it is unpacked; None: in the slot itself."""
        return torch.empty(self.size, dtype=torch.uint8, device=device) if any(self._in_8_bits) else None

    def pack(self, parameters: Sequence[nn.Parameter], flat: Tensor) -> None:
        """Move parameters into the buffer that is kept."""
        for parameter, (place, scales) in zip(parameters, self._kept, strict=True):
            found = values_of(parameter)
            if found is None:
                _cut(flat, place, parameter.dtype).view(parameter.shape).copy_(parameter.data)
            else:
                _cut(flat, place, torch.int8).copy_(found.steps.view(-1))
                _cut(flat, scales, torch.float32).copy_(found.scales.view(-1))
                found.forget()
        self.point_back(parameters, flat)

    def unpack(self, flat: Tensor, slot: Tensor) -> None:
        """Make the weights of a block from its buffer, on the device."""
        if not any(self._in_8_bits):
            slot.copy_(flat, non_blocking=True)
            return
        for (place, scales), end, (_, dtype), in_8_bits in zip(
            self._kept, self._slot, self._shapes, self._in_8_bits, strict=True
        ):
            out = _cut(slot, end, dtype)
            if in_8_bits:
                factors = _cut(flat, scales, torch.float32)[:, None]
                Int8(_cut(flat, place, torch.int8).view(len(factors), -1), factors).read(out)
            else:
                out.copy_(_cut(flat, place, dtype))

    def point(self, parameters: Sequence[nn.Parameter], slot: Tensor) -> None:
        """Let parameters hold what is in a slot."""
        for parameter, place, (shape, dtype) in zip(parameters, self._slot, self._shapes, strict=True):
            parameter.data = _cut(slot, place, dtype).view(shape)

    def point_back(self, parameters: Sequence[nn.Parameter], flat: Tensor) -> None:
        """Let parameters hold what is kept."""
        for parameter, (place, _), (shape, dtype), in_8_bits in zip(
            parameters, self._kept, self._shapes, self._in_8_bits, strict=True
        ):
            kept = no_values(shape, dtype) if in_8_bits else _cut(flat, place, dtype).view(shape)
            parameter.data = kept


def _cut(flat: Tensor, place: _Place, dtype: torch.dtype) -> Tensor:
    start, count = place
    return flat[start : start + count].view(dtype)


def _layout(sizes: Iterable[int]) -> tuple[list[_Place], int]:
    """Where parts of so many bytes lie in a flat buffer, as (start, bytes), and the size of it."""
    places, end = [], 0
    for count in sizes:
        places.append((end, count))
        end += -(-count // _ALIGN) * _ALIGN
    return places, end
