"""Checkpoints written while training goes on.

What a checkpoint holds is first copied to host memory, beside the computing; then a thread serialises, hashes and
writes it. At most one is being written. The copies are kept and used again, page-locked for a GPU: as much as the
trained weights and the optimizer's state, for 5B and rank 128 about 2 GiB with what torch rounds page-locked memory up
to. Where they would take more than half of the free host memory, as for all weights of a large model, training waits
while its own tensors are written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from cogcache.allocator import locked_size
from cogcache.errors import CogcacheError
from cogcache.progress import say
from cogcache.train.checkpoints import TrainerState, prune_checkpoints, save_checkpoint
from cogcache.train.memory.host import COPIES_SHARE

__all__ = ["Draft", "HostCopies", "Saver"]


class HostCopies:
    """Copies of named tensors in host memory, in buffers that are used again."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        stream: Any = torch.cuda.Stream
        self._stream: torch.cuda.Stream | None = stream(device) if device.type == "cuda" else None
        self._buffers: dict[str, Tensor] = {}
        self._done: Any = None

    def have_room(self, tensors: Mapping[str, Tensor]) -> bool:
        """Whether buffers for these are there, or take at most half of the free host memory."""
        import psutil

        missing = sum(self._size(tensor) for name, tensor in tensors.items() if name not in self._buffers)
        return missing <= COPIES_SHARE * int(psutil.virtual_memory().available)

    def take(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Start copying; those of the last call are overwritten. What lies on the host is copied at once."""
        if self._stream is None:
            return {name: self._buffer(name, tensor).copy_(tensor) for name, tensor in tensors.items()}
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            copies = {
                name: self._buffer(name, tensor).copy_(tensor, non_blocking=True)
                for name, tensor in tensors.items()
            }
            self._done = self._stream.record_event()
        return copies

    def protect(self) -> None:
        """Let what the device is given from here on wait until it may change what was copied."""
        if self._done is not None:
            torch.cuda.current_stream(self._device).wait_event(self._done)

    def settle(self) -> None:
        """Wait until the copies have arrived."""
        if self._done is not None:
            self._done.synchronize()

    def _size(self, tensor: Tensor) -> int:
        return tensor.nbytes if self._stream is None else locked_size(tensor.nbytes)

    def _buffer(self, name: str, like: Tensor) -> Tensor:
        if name not in self._buffers:
            self._buffers[name] = torch.empty(
                like.shape, dtype=like.dtype, pin_memory=self._stream is not None
            )
        return self._buffers[name]


@dataclass(frozen=True)
class Draft:
    """A checkpoint that is not written yet. ``live``: its tensors are training's own, so it must wait for the write."""

    state: TrainerState
    weights: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    live: bool


class Saver:
    """Writes checkpoints; a context manager that waits for the last one.

    Args:
        write_weights: Writes the given weights into the folder it is given, durably.
        keep: How many checkpoints to keep; 0 keeps all.
        writes: False for a process that takes part without writing.
    """

    def __init__(
        self,
        output: Path,
        keep: int,
        device: torch.device,
        write_weights: Callable[[Path, Mapping[str, Tensor]], None],
        *,
        writes: bool = True,
    ) -> None:
        self._output, self._keep, self._write_weights = output, keep, write_weights
        self._writes = writes
        self._copies = HostCopies(device)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="cogcache-save")
        self._writing: Future[None] | None = None
        self.step: int | None = None
        """That of the last checkpoint that was given to :meth:`start`."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Raises what :meth:`wait` raises, unless something else is being raised."""
        self._pool.shutdown(wait=True)
        try:
            self.wait()
        except CogcacheError as error:
            if kind is None:
                raise
            say(f"The last checkpoint could not be saved, either: {error}")

    def take(
        self, state: TrainerState, weights: Mapping[str, Tensor], optimizer: Mapping[str, Tensor]
    ) -> Draft:
        """Copy what a checkpoint holds, when the one before is written."""
        self.wait()
        named = {
            **{f"weights {n}": t for n, t in weights.items()},
            **{f"state {n}": t for n, t in optimizer.items()},
        }
        if not self._copies.have_room(named):
            return Draft(state, weights, optimizer, live=True)
        copies = self._copies.take(named)
        return Draft(
            state,
            {name: copies[f"weights {name}"] for name in weights},
            {name: copies[f"state {name}"] for name in optimizer},
            live=False,
        )

    def protect(self) -> None:
        """To be called before weights change: the device then waits for the copies."""
        self._copies.protect()

    def start(self, draft: Draft) -> None:
        """Write ``draft``; returns at once, unless it is live."""
        self.step = draft.state.step
        if self._writes:
            self._writing = self._pool.submit(self._write, draft)
        if draft.live:
            self.wait()

    def check(self) -> None:
        """Raises StorageError if a checkpoint could not be written."""
        if self._writing is not None and self._writing.done():
            self.wait()

    def wait(self) -> None:
        """Wait until nothing is being written; raises as :meth:`check` does."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _write(self, draft: Draft) -> None:
        self._copies.settle()
        save_checkpoint(
            self._output,
            draft.state,
            lambda folder: self._write_weights(folder, draft.weights),
            draft.optimizer,
        )
        prune_checkpoints(self._output, self._keep)
