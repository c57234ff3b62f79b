"""Tensors in one safetensors file, or in several where they are large. Nothing is pickled.

One file is named ``<stem>.safetensors``; several ``<stem>-00001-of-00003.safetensors``..., as the hub libraries
name them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from cogcache.errors import StorageError

__all__ = ["SHARD_BYTES", "save_shards", "split"]

SHARD_BYTES = 5 * 2**30
"""Most bytes of tensors in a file, save where a single tensor is larger."""


def save_shards(
    folder: Path, stem: str, tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None
) -> dict[str, str]:
    """Write ``tensors``, in order, into ``folder``; durable on return. Equal tensors give equal bytes.

    Args:
        dtype: Cast floating tensors to it, a file at a time. Default: as they are.

    Returns:
        Name of the file that holds each tensor.

    Raises:
        StorageError: if the disk is full or cannot be written.
    """
    sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in tensors.items()}
    groups = split(sizes, SHARD_BYTES)
    places = {}
    for number, names in enumerate(groups, 1):
        suffix = f"-{number:05d}-of-{len(groups):05d}" if len(groups) > 1 else ""
        path = folder / f"{stem}{suffix}.safetensors"
        _save(path, {name: _plain(tensors[name], dtype) for name in names})
        places.update(dict.fromkeys(names, path.name))
    return places


def split(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Names in order, in groups of at most ``limit`` bytes; at least one group, none empty but the only one."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if groups[-1] and filled + size > limit:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    return groups


def _plain(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """On the CPU, contiguous, in storage of its own, which safetensors asks for."""
    wanted = dtype if dtype and tensor.is_floating_point() else tensor.dtype
    plain = tensor.detach().to(device="cpu", dtype=wanted).contiguous()
    alone = plain.untyped_storage().nbytes() == plain.numel() * plain.element_size()
    return plain if alone else plain.clone()


def _save(path: Path, tensors: dict[str, Tensor]) -> None:
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:  # how safetensors reports that the disk is full
        raise StorageError(f"{path} cannot be written: {error}.", "Free some space, then resume.") from None
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
