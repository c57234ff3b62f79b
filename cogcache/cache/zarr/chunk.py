"""One tensor as the bytes of a zarr chunk, and back: little-endian values, blosc, crc32c.

Stock zarr decodes the same bytes with the codecs that :mod:`cogcache.cache.zarr.array` names. Nothing in a header is
believed before it agrees with the size that is expected, so a forged one takes no memory.
"""

from __future__ import annotations

import struct
from types import ModuleType
from typing import TYPE_CHECKING, Any

from cogcache.cache.format import ZarrCompression
from cogcache.cache.tensors import Buffer

if TYPE_CHECKING:
    import torch

__all__ = ["CRC_SIZE", "DTYPES", "LEVEL", "MAX_BYTES", "crc32c", "decode", "encode", "sound"]

DTYPES = {
    "bfloat16": ("uint16", 2),
    "float16": ("float16", 2),
    "float32": ("float32", 4),
    "uint8": ("uint8", 1),
}
"""Dtype of a tensor -> zarr data type and bytes of a value. Zarr has no bfloat16: its bits are kept."""
LEVEL = 3
"""Level of zstd: higher ones take long and gain nearly nothing on latents (``benchmarks/records``)."""
MAX_BYTES = 2**31 - 17
"""A tensor may not be larger: blosc counts in 31 bits, its header included."""
CRC_SIZE = 4
_HEADER = struct.Struct("<BBBBIII")
_COPIED = 0x02
_ZSTD = 4


def encode(tensor: torch.Tensor, compression: ZarrCompression) -> bytes:
    """The chunk of a contiguous CPU tensor of one of :data:`DTYPES`. Equal values give equal bytes."""
    values = _bytes(tensor).view(f"u{tensor.element_size()}")
    body = _blosc().compress(values, b"zstd", LEVEL, 1) if compression == "zstd" else values.tobytes()
    return bytes(body) + crc32c(body)


def decode(chunk: Buffer, compression: ZarrCompression, shape: tuple[int, ...], dtype: str) -> torch.Tensor:
    """The tensor of a chunk; values go straight into its memory, or stay where they are.

    The crc32c is not looked at, see :func:`sound`.

    Raises:
        ValueError: if these are not the bytes of a tensor of this shape.
    """
    import torch

    body, size = memoryview(chunk)[:-CRC_SIZE], DTYPES[dtype][1]
    count = size
    for length in shape:
        count *= length
    if compression == "none":
        if len(body) != count:
            raise ValueError(f"its chunk has {len(body)} bytes of values, not {count}")
        own = memoryview(bytearray(body)) if body.readonly else body
        return torch.frombuffer(own, dtype=getattr(torch, dtype)).view(shape)
    _check_header(body, count, size)
    tensor = torch.empty(shape, dtype=getattr(torch, dtype))
    try:
        _blosc().decompress(body, _bytes(tensor))
    except RuntimeError as error:
        raise ValueError(f"its chunk cannot be decompressed: {error}") from None
    return tensor


def _check_header(body: memoryview, count: int, size: int) -> None:
    """Refuse what is not blosc with zstd of just these sizes."""
    if len(body) < _HEADER.size:
        raise ValueError("its chunk is cut")
    version, _, flags, width, full, _, whole = _HEADER.unpack_from(body)
    if version != 2 or flags >> 5 != _ZSTD or (width, full, whole) != (size, count, len(body)):
        raise ValueError(f"its chunk is not {count} bytes of values, compressed to {len(body)}")
    if flags & _COPIED and whole != count + _HEADER.size:
        raise ValueError("its chunk is not as long as its values")


def sound(chunk: bytes) -> bool:
    """Whether a chunk ends in the crc32c of what is before, as stock zarr checks it."""
    return len(chunk) > CRC_SIZE and crc32c(chunk[:-CRC_SIZE]) == chunk[-CRC_SIZE:]


def crc32c(data: bytes) -> bytes:
    """CRC-32C (Castagnoli), four bytes, little-endian."""
    import google_crc32c

    value: int = google_crc32c.value(data)
    return value.to_bytes(CRC_SIZE, "little")


def _bytes(tensor: torch.Tensor) -> Any:
    """The tensor's own memory as a flat array of bytes."""
    import torch

    return tensor.reshape(-1).view(torch.uint8).numpy()


def _blosc() -> ModuleType:
    """Blosc on the calling thread alone: its own threads would write blocks in any order, and hold others up."""
    from numcodecs import blosc

    blosc.use_threads = False
    module: ModuleType = blosc
    return module
