"""Reading safetensors bytes in place gives what the library gives, and refuses whatever else there may be."""

from __future__ import annotations

import json
import struct
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from cogcache.cache.tensors import dump_tensors, load_tensors

SHAPES: list[tuple[int, ...]] = [(3,), (2, 5, 7), (1, 1), (0, 4), ()]


def some(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    values = torch.Generator().manual_seed(7)
    return {str(shape): torch.randn(shape, generator=values).to(dtype) for shape in SHAPES}


def writable(data: bytes) -> memoryview:
    return np.frombuffer(bytearray(data), np.uint8).data


def file_of(header: Any, values: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + values


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_gives_what_the_library_gives(dtype: torch.dtype) -> None:
    data = dump_tensors(some(dtype))
    assert data == safetensors.torch.save(some(dtype))
    expected = safetensors.torch.load(data)
    for source in (data, writable(data)):
        found = load_tensors(source)
        assert found.keys() == expected.keys()
        for name, tensor in found.items():
            assert tensor.dtype == dtype
            assert torch.equal(tensor, expected[name])


def test_metadata_and_strided_tensors() -> None:
    tensor = torch.arange(12.0).view(3, 4).T
    assert torch.equal(load_tensors(dump_tensors({"a": tensor}))["a"], tensor)
    data = safetensors.torch.save({"a": tensor.contiguous()}, metadata={"format": "pt"})
    assert [*load_tensors(data)] == ["a"]


@pytest.mark.parametrize("spaces", range(8))
def test_values_at_any_alignment(spaces: int) -> None:
    header = (
        json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode() + b" " * spaces
    )
    data = file_of(header, struct.pack("<2f", 1.5, -2))
    assert load_tensors(writable(data))["a"].tolist() == [1.5, -2]


def test_bytes_are_never_written_to() -> None:
    data = dump_tensors({"a": torch.zeros(4)})
    before = bytes(data)
    load_tensors(data)["a"].add_(1)
    assert data == before
    own = writable(data)
    load_tensors(own)["a"].add_(1)
    assert bytes(own) != before


GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
WRONG: dict[str, bytes] = {
    "empty": b"",
    "short": b"\0" * 7,
    "long header": file_of({"a": GOOD}, bytes(8), length=2**63),
    "header of more than there is": file_of({"a": GOOD}, bytes(8), length=10_000),
    "no JSON": file_of(b"{", bytes(8)),
    "a list": file_of([GOOD], bytes(8)),
    "deep": file_of(b"[" * 100_000, bytes(8)),
    "no description": file_of({"a": 1}, bytes(8)),
    "unknown dtype": file_of({"a": GOOD | {"dtype": "I64"}}, bytes(8)),
    "dtype of another kind": file_of({"a": GOOD | {"dtype": ["F32"]}}, bytes(8)),
    "huge shape": file_of({"a": GOOD | {"shape": [2**62, 2**62]}}, bytes(8)),
    "negative shape": file_of({"a": GOOD | {"shape": [-2, -1]}}, bytes(8)),
    "float shape": file_of({"a": GOOD | {"shape": [2.0]}}, bytes(8)),
    "true as a number": file_of({"a": GOOD | {"shape": [True, 2]}}, bytes(8)),
    "shape of another kind": file_of({"a": GOOD | {"shape": 2}}, bytes(8)),
    "one offset": file_of({"a": GOOD | {"data_offsets": [0]}}, bytes(8)),
    "offsets behind the end": file_of({"a": GOOD | {"data_offsets": [8, 16]}}, bytes(8)),
    "offsets backwards": file_of({"a": GOOD | {"data_offsets": [8, 0]}}, bytes(8)),
    "negative offset": file_of({"a": GOOD | {"data_offsets": [-8, 0]}}, bytes(8)),
    "odd offset": file_of({"a": GOOD | {"data_offsets": [1, 9]}}, bytes(16)),
    "cut": file_of({"a": GOOD}, bytes(7)),
}


@pytest.mark.parametrize("data", WRONG.values(), ids=WRONG.keys())
def test_anything_else_is_refused(data: bytes) -> None:
    for source in (data, writable(data) if data else data):
        with pytest.raises(ValueError):
            load_tensors(source)
