"""Tensors of an entry to and from safetensors bytes, without a copy on the way in.

``safetensors.torch.load`` copies every value; here the tensors lie in the memory that the file was read into.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from cogcache.cache.lines import parse_object

if TYPE_CHECKING:
    import torch

__all__ = ["Buffer", "dump_tensors", "load_tensors"]

Buffer = bytes | memoryview
"""Bytes that were read: a ``memoryview`` is writable memory that nobody else uses."""

_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "U8": "uint8"}
_LONGEST_HEADER = 1 << 20


def dump_tensors(tensors: Mapping[str, torch.Tensor]) -> bytes:
    """A safetensors file without metadata. Tensors are stored contiguous, in the dtype they come in."""
    import safetensors.torch

    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return safetensors.torch.save(plain)


def load_tensors(data: Buffer) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file: float32, float16, bfloat16 or uint8.

    They share the memory of a writable ``data``.

    Raises:
        ValueError: if it is no such file, whatever lengths it claims.
    """
    import torch

    view = memoryview(data)
    if len(view) < 8:
        raise ValueError("not a safetensors file: it is too short")
    start = 8 + int.from_bytes(view[:8], "little")
    if start > min(len(view), _LONGEST_HEADER):
        raise ValueError("not a safetensors file: its header does not fit")
    header = parse_object(bytes(view[8:start]))
    header.pop("__metadata__", None)
    view = memoryview(bytearray(view[start:])) if view.readonly or start % 8 else view[start:]
    values = torch.frombuffer(view, dtype=torch.uint8) if len(view) else torch.empty(0, dtype=torch.uint8)
    return {name: _tensor(name, said, values) for name, said in header.items()}


def _tensor(name: str, said: Any, values: torch.Tensor) -> torch.Tensor:
    import torch

    try:
        dtype = getattr(torch, _DTYPES[said["dtype"]])
        shape, (begin, end) = said["shape"], said["data_offsets"]
        numbers = [*shape, begin, end]
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"not a safetensors file: tensor {name!r:.80} is not described") from None
    if any(type(number) is not int or number < 0 for number in numbers):
        raise ValueError(f"not a safetensors file: tensor {name!r:.80} has wrong numbers")
    if end > len(values) or end - begin != math.prod(shape) * dtype.itemsize or begin % dtype.itemsize:
        raise ValueError(f"not a safetensors file: tensor {name!r:.80} lies outside it, or has another size")
    try:
        return values[begin:end].view(dtype).view(shape)
    except (RuntimeError, TypeError):  # an empty tensor may claim any lengths
        raise ValueError(f"not a safetensors file: tensor {name!r:.80} has an impossible shape") from None
