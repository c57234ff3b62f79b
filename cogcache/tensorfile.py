"""The header of a safetensors file, read without torch and without trusting it.

Format: 8 bytes little-endian length N, N bytes of JSON, then tensor data. See the "Format" section of the
safetensors README.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["TensorHeader", "read_tensor_header"]

_LONGEST_HEADER = 100_000_000  # the safetensors library's own bound


@dataclass(frozen=True)
class TensorHeader:
    """By tensor name: shapes, dtypes (``F32``, ``BF16``...) and bytes of the file, first and behind the last; and the
    free text metadata."""

    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    metadata: dict[str, str]
    places: dict[str, tuple[int, int]] = field(default_factory=dict)


def read_tensor_header(path: Path) -> TensorHeader:
    """Read the header alone.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it is not a safetensors file; the message says why.
    """
    size = path.stat().st_size
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 10 or not 2 <= length <= min(size - 8, _LONGEST_HEADER):
            raise ValueError("it does not start like a safetensors file")
        text = stream.read(length)
    try:
        header = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError("its header is not JSON") from None
    if not isinstance(header, dict):
        raise ValueError("its header is not a JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError("its metadata is not text")
    shapes = {name: _checked_shape(name, entry, size - 8 - length) for name, entry in header.items()}
    start = 8 + length
    places = {n: (start + e["data_offsets"][0], start + e["data_offsets"][1]) for n, e in header.items()}
    return TensorHeader(shapes, {n: e["dtype"] for n, e in header.items()}, metadata, places)


def _checked_shape(name: str, entry: Any, data_size: int) -> tuple[int, ...]:
    try:
        shape, (begin, end) = entry["shape"], entry["data_offsets"]
        numbers = [*shape, begin, end]
        ok = isinstance(entry["dtype"], str) and all(type(n) is int and n >= 0 for n in numbers)
    except (KeyError, TypeError, ValueError):
        ok = False
    if not ok or not begin <= end <= data_size:
        raise ValueError(f"its entry {name[:100]!r} is damaged, or the file is cut short")
    return tuple(shape)
