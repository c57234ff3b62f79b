"""What crosses between device and host without either waiting for the other: numbers out, batches in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from cogcache.train.data import Batch

__all__ = ["LateNumbers", "Uploads"]


class LateNumbers:
    """Numbers on their way from the device to the host, asked for when they have long arrived.

    Args:
        values: One dimension, float32.
    """

    def __init__(self, values: Tensor) -> None:
        self._done: Any = None
        self._host = values
        if values.is_cuda:
            self._host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._host.copy_(values, non_blocking=True)
            self._done = torch.cuda.current_stream(values.device).record_event()

    def read(self) -> list[float]:
        """The numbers; waits until the device has come as far."""
        if self._done is not None:
            self._done.synchronize()
        numbers: list[float] = self._host.tolist()
        return numbers


class Uploads:
    """Batches on the device, the next one already on its way while one is at work.

    The copies have a stream of their own, so they are not behind the forward pass that they are for. Without a GPU the
    batches are the same, and as far ahead.

    Args:
        batches: On the host, in page-locked memory for a GPU.
    """

    def __init__(self, batches: Iterator[Batch], device: torch.device) -> None:
        self._batches, self._device = batches, device
        stream: Any = torch.cuda.Stream
        self._stream: torch.cuda.Stream | None = stream(device) if device.type == "cuda" else None
        self._next: Callable[[], Batch] | None = None
        self._waited = 0.0

    def waited(self) -> float:
        """Seconds that the host has waited for the reader since it was last asked."""
        waited, self._waited = self._waited, 0.0
        return waited

    def ahead(self) -> None:
        """Start on the next batch, if there is one. An error over it is kept until it is taken."""
        if self._next is None:
            self._next = self._start()

    def take(self) -> Batch:
        """The next batch.

        Raises:
            CogcacheError: if it could not be read.
        """
        self.ahead()
        assert self._next is not None
        ready, self._next = self._next, None
        return ready()

    def _start(self) -> Callable[[], Batch]:
        """Read and send off; an error is raised where the batch is missed: what came before it is finished first."""
        started = perf_counter()
        try:
            batch = next(self._batches)
        except Exception as error:
            return _raising(error)
        finally:
            self._waited += perf_counter() - started
        return self._upload(batch)

    def _upload(self, batch: Batch) -> Callable[[], Batch]:
        stream = self._stream
        if stream is None:
            there = batch.map(lambda tensor: tensor.to(self._device))
            return lambda: there
        with torch.cuda.stream(stream):
            copied = batch.map(lambda tensor: tensor.to(self._device, non_blocking=True))
            done = stream.record_event()

        def ready() -> Batch:
            current = torch.cuda.current_stream(self._device)
            current.wait_event(done)
            copied.map(lambda tensor: _used_by(tensor, current))
            return copied

        return ready


def _used_by(tensor: Tensor, stream: torch.cuda.Stream) -> Tensor:
    tensor.record_stream(stream)
    return tensor


def _raising(error: Exception) -> Callable[[], Batch]:
    def ready() -> Batch:
        raise error

    return ready
