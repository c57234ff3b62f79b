"""Work for a device that is handed over without waiting: copies in, computation, copies out.

On a GPU, inputs go through page-locked memory on a stream of their own while the work before them still runs, and
results come back into page-locked memory. On a CPU everything is done at once.
"""

from __future__ import annotations

import threading
from typing import Any

import torch

__all__ = ["Lane", "Running"]


class Running:
    """A tensor on its way from the device to the CPU; :meth:`result` waits for it."""

    def __init__(self, values: torch.Tensor, lane: Lane, begun: Any = None, done: Any = None) -> None:
        self._values, self._lane, self._begun, self._done = values, lane, begun, done

    def result(self) -> torch.Tensor:
        """The tensor on the CPU. Safe to call in another thread than the one that began the work."""
        if self._done is not None:
            self._done.synchronize()
            self._lane.count(self._begun.elapsed_time(self._done) / 1e3)
            self._done = None
        return self._values


class Lane:
    """The way of tensors to one device and back.

    Attributes:
        busy_s: Time that the device spent on what was downloaded so far, from GPU events; 0 on a CPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.busy_s = 0.0
        self._cuda = device.type == "cuda"
        stream: Any = torch.cuda.Stream
        self._uploads: Any = stream(device) if self._cuda else None
        self._turn = threading.Lock()

    def mark(self) -> Any:
        """An event of the GPU at this point of its work; None on a CPU."""
        if not self._cuda:
            return None
        event: Any = torch.cuda.Event
        mark = event(
            enable_timing=True, blocking=True
        )  # a thread that waits for it leaves the core to others
        mark.record(torch.cuda.current_stream(self.device))
        return mark

    def upload(self, values: torch.Tensor) -> torch.Tensor:
        """The tensor on the device, for work that is begun from here on. The caller may let go of ``values``."""
        if not self._cuda or values.device.type == "cuda":
            return values.to(self.device)
        pinned = torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values)
        work = torch.cuda.current_stream(self.device)
        with torch.cuda.stream(self._uploads):
            there = pinned.to(self.device, non_blocking=True)
        work.wait_stream(self._uploads)
        there.record_stream(work)
        return there

    def download(self, values: torch.Tensor, begun: Any) -> Running:
        """Begin to bring a result back.

        Args:
            begun: :meth:`mark` from before the work on it.
        """
        if begun is None:
            return Running(values.cpu(), self)
        pinned = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        pinned.copy_(values, non_blocking=True)
        return Running(pinned, self, begun, self.mark())

    def count(self, seconds: float) -> None:
        """Add to ``busy_s``."""
        with self._turn:
            self.busy_s += seconds
