"""Reads a model's weights from safetensors files: several threads, each straight to where its tensor belongs.

Memory maps are not used: a file that another program cuts short then gives an error, not a crash, and pages are not
fetched one fault at a time. On the way to a GPU bytes pass through a small page-locked buffer for each thread.
"""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cogcache.tensorfile import read_tensor_header

__all__ = ["STAGED", "read_weights", "weight_files"]

_STEM = "diffusion_pytorch_model"  # diffusers.utils.SAFETENSORS_WEIGHTS_NAME
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_THREADS = 8
_BUFFER = 32 << 20
STAGED = _THREADS * _BUFFER
"""Bytes of host memory at most, on the way to a GPU."""
CPU = torch.device("cpu")


def weight_files(folder: Path) -> list[Path]:
    """The files of a component in diffusers layout: one, or those that its index names.

    Raises:
        OSError, ValueError, KeyError: if there are none, or the index is damaged or names files elsewhere.
    """
    whole = folder / f"{_STEM}.safetensors"
    if whole.is_file():
        return [whole]
    index = json.loads((folder / f"{whole.name}.index.json").read_text("utf-8"))
    names = sorted({str(name) for name in index["weight_map"].values()})
    if not names or any(Path(name).name != name for name in names):
        raise ValueError("its index names no files, or files elsewhere")
    return [folder / name for name in names]


@dataclass(frozen=True)
class _Stored:
    """A tensor in a file; ``place`` are its bytes, first and behind the last."""

    path: Path
    place: tuple[int, int]
    shape: tuple[int, ...]
    dtype: torch.dtype


def read_weights(
    folder: Path,
    dtype: torch.dtype,
    device: torch.device = CPU,
    keep: Callable[[str, Tensor], Tensor] = lambda _, tensor: tensor,
) -> dict[str, Tensor]:
    """All tensors of a component, on ``device`` in ``dtype``.

    Args:
        keep: What is kept of each, by its name, as soon as it is there. Called by several threads, but one at a time.

    Raises:
        OSError, ValueError, KeyError: if files are missing or damaged, or hold other than floating tensors.
    """
    stored: dict[str, _Stored] = {}
    for path in weight_files(folder):
        header = read_tensor_header(path)
        for name, shape in header.shapes.items():
            stored[name] = _Stored(path, header.places[name], shape, _DTYPES[header.dtypes[name]])
    reader = _Reader(dtype, device)
    with ThreadPoolExecutor(
        min(_THREADS, os.cpu_count() or 1), thread_name_prefix="cogcache-weights"
    ) as pool:
        lock = threading.Lock()

        def read(name: str) -> Tensor:
            tensor = reader.read(stored[name])
            with lock:
                return keep(name, tensor)

        return dict(zip(stored, pool.map(read, stored), strict=True))


class _Reader:
    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype, self._device = dtype, device
        self._staged = device.type != "cpu"
        self._local = threading.local()

    def read(self, stored: _Stored) -> Tensor:
        """One tensor; for several threads."""
        if math.prod(stored.shape) * stored.dtype.itemsize != stored.place[1] - stored.place[0]:
            raise ValueError(f"a tensor in {stored.path.name} has another size than its shape")
        with self._on_device(), stored.path.open("rb", buffering=0) as stream:
            tensor = torch.empty(stored.shape, dtype=stored.dtype, device=self._device)
            stream.seek(stored.place[0])
            self._fill(tensor.view(-1).view(torch.uint8), stream)
            return tensor.to(self._dtype)

    def _fill(self, flat: Tensor, stream: FileIO) -> None:
        """Bytes of a tensor from a file that stands at its first."""
        if not self._staged:
            _read_into(flat, stream)
            return
        for start in range(0, len(flat), _BUFFER):
            part = flat[start : start + _BUFFER]
            buffer = self._buffer()[: len(part)]
            _read_into(buffer, stream)
            part.copy_(buffer)  # returns when it is done, and other threads read meanwhile

    def _buffer(self) -> Tensor:
        if not hasattr(self._local, "buffer"):
            pinned = self._device.type == "cuda"
            self._local.buffer = torch.empty(_BUFFER, dtype=torch.uint8, pin_memory=pinned)
        buffer: Tensor = self._local.buffer
        return buffer

    def _on_device(self) -> AbstractContextManager[Any]:
        return torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext()


def _read_into(flat: Tensor, stream: FileIO) -> None:
    array: Any = flat.numpy()
    rest = memoryview(array)
    while rest:
        count = stream.readinto(rest)
        if not count:
            raise ValueError(f"{stream.name} is cut short")
        rest = rest[count:]
