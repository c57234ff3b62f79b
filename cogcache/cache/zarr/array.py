"""What all entries of one array share, and how it is told: to other programs in ``zarr.json``, and in each entry."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast, get_args

from cogcache.cache.format import IMAGES, LATENTS, TEXT, ZarrCompression, canonical_json
from cogcache.cache.lines import parse_object, pretty_json
from cogcache.cache.zarr.chunk import DTYPES, LEVEL, MAX_BYTES

__all__ = [
    "METADATA",
    "RANKS",
    "ZarrArray",
    "array_json",
    "description",
    "group_json",
    "parse_array",
    "parse_description",
]

METADATA = "zarr.json"
RANKS = {LATENTS: 4, TEXT: 2, IMAGES: 4}
"""Number of axes of the tensors of each series: it is part of the name of a data file."""
_CRC32C = {"name": "crc32c"}
_LITTLE = {"name": "bytes", "configuration": {"endian": "little"}}
_NANS = {"uint16": 0x7FC0, "uint8": 0xFF}
"""What reads as NaN where bits are kept: of bfloat16, and of bytes of a mean, bfloat16 or float16."""
_ATTRIBUTE = "cogcache"


@dataclass(frozen=True)
class ZarrArray:
    """What all entries of an array share. ``shape`` is that of one tensor."""

    tensor: str
    dtype: str
    shape: tuple[int, ...]
    compression: ZarrCompression

    @classmethod
    def checked(cls, tensor: object, dtype: object, shape: object, compression: object) -> ZarrArray:
        """From values of a file.

        Raises:
            ValueError: if they describe no array.
        """
        if not isinstance(tensor, str) or not isinstance(dtype, str):
            raise ValueError("its tensor or dtype is no text")
        if dtype not in DTYPES or compression not in get_args(ZarrCompression):
            raise ValueError("its dtype or compression is none that can be here")
        if not isinstance(shape, list) or not all(type(length) is int and length > 0 for length in shape):
            raise ValueError("its shape is not a list of lengths of 1 or more")
        count = DTYPES[dtype][1]
        for length in shape:
            count *= length
            if count > MAX_BYTES:
                raise ValueError(f"its tensor would have more than {MAX_BYTES} bytes")
        return cls(tensor, dtype, tuple(shape), cast("ZarrCompression", compression))

    def facts(self) -> dict[str, Any]:
        """As plain JSON."""
        return {
            "tensor": self.tensor,
            "dtype": self.dtype,
            "shape": list(self.shape),
            "compression": self.compression,
        }


def description(key: str, array: ZarrArray, facts: Mapping[str, Any]) -> bytes:
    """The second member of an entry: what its chunk is, and its facts."""
    return canonical_json({"key": key, "facts": dict(facts), **array.facts()}).encode()


def parse_description(key: str, data: bytes) -> tuple[ZarrArray, dict[str, Any]]:
    """What :func:`description` wrote: the array that the entry belongs to, and its facts.

    Raises:
        ValueError: if it is not that, of this entry.
    """
    value = parse_object(data)
    if value.keys() != {"key", "facts", "tensor", "dtype", "shape", "compression"} or value["key"] != key:
        raise ValueError("its description is not that of the entry")
    if not isinstance(value["facts"], dict):
        raise ValueError("its facts are not a JSON object")
    array = ZarrArray.checked(value["tensor"], value["dtype"], value["shape"], value["compression"])
    return array, value["facts"]


def group_json() -> bytes:
    """``zarr.json`` of the cache and of each series."""
    return pretty_json({"zarr_format": 3, "node_type": "group", "attributes": {}})


def array_json(array: ZarrArray, slots: int, rows: int, facts: dict[str, Any]) -> bytes:
    """``zarr.json`` of an array.

    Args:
        slots: Rows of one shard.
        rows: Rows up to the last entry; one that no shard holds reads as NaN.
        facts: What every shard of the series says of itself.
    """
    kind, size = DTYPES[array.dtype]
    codecs: list[dict[str, Any]] = [_LITTLE]
    if array.compression == "zstd":
        settings = {"cname": "zstd", "clevel": LEVEL, "shuffle": "shuffle", "typesize": size, "blocksize": 0}
        codecs.append({"name": "blosc", "configuration": settings})
    sharding = {
        "chunk_shape": [1, *array.shape],
        "codecs": [*codecs, _CRC32C],
        "index_codecs": [_LITTLE, _CRC32C],
        "index_location": "end",
    }
    value = {
        "zarr_format": 3,
        "node_type": "array",
        "shape": [rows, *array.shape],
        "data_type": kind,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [slots, *array.shape]}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "fill_value": _NANS.get(kind, "NaN"),
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        "attributes": {_ATTRIBUTE: {**facts, **array.facts()}},
    }
    return pretty_json(value)


def parse_array(data: bytes, facts: dict[str, Any]) -> tuple[ZarrArray, int, int]:
    """The array, its slots and its rows, as :func:`array_json` wrote them.

    Raises:
        ValueError: if a single byte differs.
    """
    try:
        value = parse_object(data)
        said, rows = value["attributes"][_ATTRIBUTE], value["shape"][0]
        slots = value["chunk_grid"]["configuration"]["chunk_shape"][0]
        array = ZarrArray.checked(said["tensor"], said["dtype"], said["shape"], said["compression"])
    except (LookupError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"it describes no array ({error!r})") from None
    if not (type(slots) is type(rows) is int and slots > 0 < rows):
        raise ValueError("its numbers of rows are none")
    if array_json(array, slots, rows, facts) != data:
        raise ValueError("it is not spelt as a writer spells it")
    return array, slots, rows
