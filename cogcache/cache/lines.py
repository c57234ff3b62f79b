"""JSON as the cache stores it: strict, and in lines that prove themselves whole."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, NoReturn

from cogcache.cache.checksum import crc32
from cogcache.cache.format import canonical_json, digest

__all__ = [
    "dump_sealed",
    "load_sealed",
    "parse_json",
    "parse_object",
    "pretty_json",
    "seal_line",
    "unseal_line",
]

_CRC = "line_crc32"


def _refuse(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _refuse(text[:40])


def parse_json(data: bytes) -> Any:
    """Parse UTF-8 JSON without NaN and infinities, ``1e999`` included.

    Raises:
        ValueError: whatever is wrong with it, nesting too deep included.
    """
    try:
        return json.loads(data.decode("utf-8"), parse_constant=_refuse, parse_float=_finite)
    except RecursionError:
        raise ValueError("nested too deep") from None


def parse_object(data: bytes) -> dict[str, Any]:
    """:func:`parse_json`, refusing anything but an object."""
    value = parse_json(data)
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value


def pretty_json(value: Any) -> bytes:
    """JSON for people, yet with only one way to write a value: sorted keys, two spaces, one last newline."""
    text = json.dumps(value, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False)
    return f"{text}\n".encode()


def dump_sealed(value: Mapping[str, Any]) -> bytes:
    """A whole file of JSON with a ``checksum`` of all its other fields."""
    return pretty_json({**value, "checksum": digest(dict(value))})


def load_sealed(data: bytes) -> dict[str, Any]:
    """The object that :func:`dump_sealed` wrote, without its checksum.

    Raises:
        ValueError: if a single byte differs from what was written.
    """
    value = parse_object(data)
    checksum = value.pop("checksum", None)
    try:
        whole = checksum == digest(value) and data == dump_sealed(value)
    except RecursionError:
        whole = False
    if not whole:
        raise ValueError("the checksum does not match")
    return value


def seal_line(value: Mapping[str, Any]) -> bytes:
    """One JSON line that holds the CRC-32 of itself without that field."""
    crc = crc32(canonical_json(dict(value)).encode())
    return f"{canonical_json({**value, _CRC: crc})}\n".encode()


def unseal_line(line: bytes) -> dict[str, Any] | None:
    """The object in a sealed line, newline included; None if it is torn or changed in any byte."""
    try:
        value = parse_object(line)
        value.pop(_CRC, None)
        whole = seal_line(value) == line
    except (ValueError, RecursionError):
        return None
    return value if whole else None
